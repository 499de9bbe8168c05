//! Owns the question whether weights and KV cache fit the memory that this process may take: the machine's, and what
//! the control groups around the process leave, which in a container is far less.
//!
//! Invariant: only what surely fails is refused. Memory is granted as it is touched, so a server that starts beyond its
//! limit would be killed in the middle of replies.

use std::fs;
use std::path::Path;

const MIB: u64 = 1 << 20;
/// Where control groups are mounted.
const CGROUPS: &str = "sys/fs/cgroup";

/// What a server's model takes, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryNeed {
    /// The model's files, which lie in memory while it runs.
    pub weights: u64,
    /// The KV cache.
    pub kv_cache: u64,
}

/// The files of one version of control groups.
struct Version {
    /// Below the mount.
    folder: &'static str,
    limit: &'static str,
    usage: &'static str,
    /// Lines of `memory.stat`: file contents, which the kernel gives up where memory is needed.
    reclaimable: [&'static str; 2],
}

const V1: Version = Version {
    folder: "memory",
    limit: "memory.limit_in_bytes",
    usage: "memory.usage_in_bytes",
    reclaimable: ["total_active_file", "total_inactive_file"],
};
const V2: Version = Version {
    folder: "",
    limit: "memory.max",
    usage: "memory.current",
    reclaimable: ["active_file", "inactive_file"],
};

/// A limit of a control group, in bytes.
#[derive(Debug, PartialEq, Eq)]
struct GroupLimit {
    name: String,
    limit: u64,
    /// What can't be given up.
    used: u64,
}

impl MemoryNeed {
    /// Refuses what can't fit, and returns a warning about what does not fit at the moment. `root` is `/`, or a
    /// test's imitation of it; what it does not tell is no limit.
    ///
    /// # Errors
    /// Which memory is too small, with the numbers.
    pub fn check(self, root: &Path) -> Result<Option<String>, String> {
        let need = self.weights.saturating_add(self.kv_cache);
        let words = format!(
            "the model's files ({} MiB) and --kv-cache-memory ({} MiB) need {} MiB together",
            self.weights.div_ceil(MIB),
            self.kv_cache / MIB,
            need.div_ceil(MIB)
        );
        let advice = "choose a smaller --kv-cache-memory";
        let machine = |name| machine_memory(root, name);
        if let Some(total) = machine("MemTotal:").filter(|total| need > *total) {
            return Err(format!("{words}, more than the machine's {} MiB: {advice}", total / MIB));
        }
        for GroupLimit { name, limit, used } in group_limits(root) {
            if need > limit.saturating_sub(used) {
                return Err(format!(
                    "{words}, more than the control group {name} leaves of its limit of {} MiB, of which {} MiB \
                     are in use: {advice} or raise the limit",
                    limit / MIB,
                    used / MIB
                ));
            }
        }
        let available = machine("MemAvailable:").filter(|available| need > *available);
        Ok(available.map(|available| {
            format!("{words}, and at the moment the machine has {} MiB to give", available / MIB)
        }))
    }
}

/// A line of `/proc/meminfo`, in bytes.
fn machine_memory(root: &Path, name: &str) -> Option<u64> {
    let text = fs::read_to_string(root.join("proc/meminfo")).ok()?;
    let value = text.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: u64 = value.split_whitespace().next()?.parse().ok()?;
    Some(kib.saturating_mul(1024))
}

/// The limits of the control groups around this process, the innermost first.
fn group_limits(root: &Path) -> Vec<GroupLimit> {
    let text = fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    let mut limits = Vec::new();
    for line in text.lines() {
        // hierarchy:controllers:path
        let mut parts = line.splitn(3, ':');
        let (Some(number), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next()) else {
            continue;
        };
        let version = match number {
            "0" if controllers.is_empty() => V2,
            _ if controllers.split(',').any(|controller| controller == "memory") => V1,
            _ => continue,
        };
        let mount = root.join(CGROUPS).join(version.folder);
        // In a container the path may be the host's, and the container's own group the root of the mount.
        let inner = Path::new(path.trim_start_matches('/')).ancestors();
        limits.extend(inner.filter_map(|group| version.limit(&mount, group)));
    }
    limits
}

impl Version {
    /// The limit of one group, if it has one.
    fn limit(&self, mount: &Path, group: &Path) -> Option<GroupLimit> {
        let folder = mount.join(group);
        let number = |file: &str| fs::read_to_string(folder.join(file)).ok()?.trim().parse::<u64>().ok();
        // "max" is no number.
        let limit = number(self.limit)?;
        let stat = fs::read_to_string(folder.join("memory.stat")).unwrap_or_default();
        let reclaimable = stat.lines().filter_map(|line| {
            let (name, value) = line.split_once(' ')?;
            self.reclaimable.contains(&name).then(|| value.trim().parse::<u64>().ok())?
        });
        let used = number(self.usage).unwrap_or(0).saturating_sub(reclaimable.sum());
        Some(GroupLimit { name: format!("/{}", group.display()), limit, used })
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    /// An imitation of a machine's files, removed on drop.
    struct Root(PathBuf);

    impl Root {
        fn new(files: &[(&str, &str)]) -> Self {
            static NEXT: AtomicU32 = AtomicU32::new(0);
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            let root = std::env::temp_dir().join(format!("glmserve-memory-{}-{number}", std::process::id()));
            for (path, text) in files {
                let path = root.join(path);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, text).unwrap();
            }
            Self(root)
        }

        fn check(&self, weights_mib: u64, kv_cache_mib: u64) -> Result<Option<String>, String> {
            MemoryNeed { weights: weights_mib * MIB, kv_cache: kv_cache_mib * MIB }.check(&self.0)
        }
    }

    impl Drop for Root {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    const MACHINE: (&str, &str) =
        ("proc/meminfo", "MemTotal:       67108864 kB\nMemFree:  1 kB\nMemAvailable:   33554432 kB\n");

    #[test]
    fn a_machine_is_a_limit_and_what_it_has_now_a_warning() {
        let root = Root::new(&[MACHINE]);
        assert_eq!(root.check(3000, 1024), Ok(None));
        let error = root.check(3000, 65_536).unwrap_err();
        assert!(error.contains("need 68536 MiB together, more than the machine's 65536 MiB"), "{error}");
        let warning = root.check(3000, 32_000).unwrap().unwrap();
        assert!(warning.ends_with("the machine has 32768 MiB to give"), "{warning}");
        assert_eq!(Root::new(&[]).check(1 << 30, 1 << 30), Ok(None), "nothing is known");
    }

    #[test]
    fn a_group_of_version_2_leaves_its_limit_without_what_is_in_use() {
        let root = Root::new(&[
            MACHINE,
            ("proc/self/cgroup", "0::/pods/pod1\n"),
            ("sys/fs/cgroup/pods/pod1/memory.max", "max\n"),
            ("sys/fs/cgroup/pods/memory.max", "8589934592\n"),
            ("sys/fs/cgroup/pods/memory.current", "2147483648\n"),
            // 1.5 GiB of the 2 are file contents.
            ("sys/fs/cgroup/pods/memory.stat", "anon 1\nactive_file 536870912\ninactive_file 1073741824\n"),
        ]);
        assert_eq!(root.check(3584, 4096), Ok(None));
        let error = root.check(3584, 4097).unwrap_err();
        let expected =
            "more than the control group /pods leaves of its limit of 8192 MiB, of which 512 MiB are in use";
        assert!(error.contains(expected), "{error}");
        assert!(
            error.starts_with("the model's files (3584 MiB) and --kv-cache-memory (4097 MiB)"),
            "{error}"
        );
    }

    #[test]
    fn the_root_of_the_mount_is_a_containers_own_group() {
        let root = Root::new(&[
            MACHINE,
            ("proc/self/cgroup", "0::/the/path/on/the/host\n"),
            ("sys/fs/cgroup/memory.max", "1073741824\n"),
        ]);
        assert_eq!(root.check(0, 1024), Ok(None));
        assert!(root.check(1, 1024).unwrap_err().contains("control group / leaves"));
    }

    #[test]
    fn a_group_of_version_1_is_read() {
        let root = Root::new(&[
            MACHINE,
            ("proc/self/cgroup", "9:cpu,cpuacct:/a\n4:memory:/docker/a\n0::/\n"),
            ("sys/fs/cgroup/memory/docker/a/memory.limit_in_bytes", "1073741824\n"),
            ("sys/fs/cgroup/memory/docker/a/memory.usage_in_bytes", "536870912\n"),
            ("sys/fs/cgroup/memory/docker/a/memory.stat", "cache 1\ntotal_inactive_file 104857600\n"),
            // No limit, as this version says it.
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n"),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "53687091200\n"),
        ]);
        assert_eq!(root.check(500, 112), Ok(None));
        let error = root.check(500, 113).unwrap_err();
        assert!(error.contains("/docker/a leaves of its limit of 1024 MiB, of which 412 MiB"), "{error}");
    }
}
