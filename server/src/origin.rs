//! Owns origins: where a web page comes from, as `Origin` says, and which of them may use this server.
//!
//! Invariant: origins are compared by what they parse to (scheme, host and port), never by a prefix of
//! their text; what does not parse is not an origin and is never allowed. Must not know HTTP requests.

use std::net::Ipv6Addr;
use std::str::FromStr;

use url::{Host, Url};

/// Longer than any host with a scheme and a port.
const MAX_BYTES: usize = 512;
/// Entries of a list, all of which are looked at for each request from a page.
const MAX_LISTED: usize = 256;

/// Where a page comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// A web server.
    Web {
        /// `https` rather than `http`.
        is_https: bool,
        /// Its host; names are in lower case and Punycode.
        host: Host,
        /// Its port, also where it is the scheme's own.
        port: u16,
    },
    /// Anything else, such as `null` or `tauri://localhost`: it equals only its exact text.
    Opaque(String),
}

impl FromStr for Origin {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.len() > MAX_BYTES {
            return Err("is longer than 512 bytes");
        }
        if !text.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err("has a character that is not visible ASCII; write names in Punycode");
        }
        if text == "null" {
            return Ok(Self::Opaque(text.to_owned()));
        }
        let Some((scheme, authority)) = text.split_once("://") else {
            return Err("has no scheme: write http://HOST:PORT or https://HOST");
        };
        let is_https = scheme.eq_ignore_ascii_case("https");
        if !is_https && !scheme.eq_ignore_ascii_case("http") {
            return match is_scheme(scheme) {
                true => Ok(Self::Opaque(text.to_owned())),
                false => Err("has a scheme that cannot be read"),
            };
        }
        // The parser of URLs would take all of these and find the host before or after them.
        if authority.contains(['/', '\\', '?', '#', '@']) {
            return Err("must be a scheme, a host and perhaps a port, with no path and no user");
        }
        let url = Url::parse(text).map_err(|_| "has a host or port that cannot be read")?;
        match (url.host(), url.port_or_known_default()) {
            (Some(host), Some(port)) => Ok(Self::Web { is_https, host: host.to_owned(), port }),
            _ => Err("has no host"),
        }
    }
}

fn is_scheme(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'-' | b'.'))
}

impl Origin {
    /// Whether a page of this origin was served under `authority`, the `Host` of its request.
    fn is_at(&self, authority: &str) -> bool {
        let Self::Web { is_https, .. } = self else { return false };
        // A host without a port has the port of the page's scheme: TLS may end in front of this server.
        let scheme = if *is_https { "https" } else { "http" };
        format!("{scheme}://{authority}").parse().as_ref() == Ok(self)
    }

    fn host(&self) -> Option<&Host> {
        match self {
            Self::Web { host, .. } => Some(host),
            Self::Opaque(_) => None,
        }
    }
}

fn is_localhost(host: &Host) -> bool {
    match host {
        Host::Domain(name) => name == "localhost",
        Host::Ipv4(address) => address.is_loopback(),
        Host::Ipv6(address) => *address == Ipv6Addr::LOCALHOST,
    }
}

/// The origins whose pages may use this server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AllowedOrigins {
    any_web: bool,
    any_localhost: bool,
    listed: Vec<Origin>,
}

impl Default for AllowedOrigins {
    /// Those of this machine.
    fn default() -> Self {
        Self { any_web: false, any_localhost: true, listed: Vec::new() }
    }
}

impl FromStr for AllowedOrigins {
    type Err = String;

    /// Reads a list with commas: origins, `localhost` for all of this machine, `*` for all of the web.
    fn from_str(text: &str) -> Result<Self, String> {
        let mut allowed = Self { any_web: false, any_localhost: false, listed: Vec::new() };
        for entry in text.split(',').map(str::trim) {
            match entry {
                "" => {
                    return Err("the list has an empty entry; leave the option out to allow the origins of \
                                localhost only"
                        .to_owned());
                }
                "*" => allowed.any_web = true,
                "localhost" => allowed.any_localhost = true,
                _ if entry.contains('*') => {
                    return Err(format!(
                        "the origin {entry:?} has a `*` in it: list each origin, or `*` alone for all, or \
                         `localhost` for every port of this machine"
                    ));
                }
                _ => allowed
                    .listed
                    .push(entry.parse().map_err(|error| format!("the origin {entry:?} {error}"))?),
            }
        }
        match allowed.listed.len() {
            0..=MAX_LISTED => Ok(allowed),
            number => Err(format!("{number} origins are listed; at most {MAX_LISTED} can be")),
        }
    }
}

impl AllowedOrigins {
    /// Whether a page of `origin` may send a request whose `Host` is `authority`.
    ///
    /// A page that this very host served may, unless an attacker's name may have been pointed at this
    /// server after the page was loaded (DNS rebinding): an IP address has no name, a listed name is the
    /// operator's, and where keys are asked for (`needs_key`) such a page has none.
    pub fn permits(&self, origin: &Origin, authority: Option<&str>, needs_key: bool) -> bool {
        if self.lists(origin) {
            return true;
        }
        let Some(host) = origin.host().filter(|_| authority.is_some_and(|host| origin.is_at(host))) else {
            return false;
        };
        let is_named = matches!(host, Host::Domain(_));
        !is_named || needs_key || is_localhost(host) || self.listed.iter().any(|o| o.host() == Some(host))
    }

    fn lists(&self, origin: &Origin) -> bool {
        let is_default =
            origin.host().is_some_and(|host| self.any_web || self.any_localhost && is_localhost(host));
        is_default || self.listed.contains(origin)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allowed(list: &str) -> AllowedOrigins {
        list.parse().unwrap()
    }

    /// Whether a page may use a server at another host.
    fn passes(list: &str, origin: &str) -> bool {
        origin.parse().is_ok_and(|origin| allowed(list).permits(&origin, Some("api.example:8000"), false))
    }

    #[test]
    fn localhost_is_a_host_and_not_a_prefix() {
        for origin in [
            "http://localhost",
            "https://localhost:3000",
            "http://127.0.0.1:8080",
            "http://127.9.9.9",
            "http://[::1]:5173",
            "HTTP://LOCALHOST:3000",
            "http://[0:0:0:0:0:0:0:1]",
        ] {
            assert!(passes("localhost", origin), "{origin}");
            assert!(!passes("https://chat.example", origin), "a list replaces the default: {origin}");
        }
        for origin in [
            "http://localhost.evil.com",
            "http://localhost.",
            "http://evil-localhost",
            "http://127.0.0.1.evil.com",
            "http://127.0.0.1@evil.com",
            "http://localhost:80@evil.com",
            "http://evil.com:80",
            "http://evil.com#localhost",
            "http://evil.com?localhost",
            "http://evil.com/localhost",
            "http://localhost\\@evil.com",
            "http://localhost/",
            "http://localhost:3000:80",
            "http://localhost:99999",
            "http://localhost%2eevil.com",
            "http://[::2]",
            "http://[::1",
            "http://",
            "http:localhost",
            "localhost",
            "//localhost",
            "",
            "null",
            "ftp://localhost",
            "tauri://localhost",
            "http://localhost http://evil.com",
            "http://localhost,http://evil.com",
            "http://locälhost",
            "http://localhost\u{0}",
        ] {
            assert!(!passes("localhost", origin), "{origin}");
        }
        assert!(!passes("localhost", &format!("http://localhost:{}80", "0".repeat(MAX_BYTES))));
    }

    #[test]
    fn a_listed_origin_is_its_scheme_host_and_port() {
        let list = "https://Chat.Example, http://10.0.0.7:3000,https://xn--bcher-kva.example";
        for origin in [
            "https://chat.example",
            "https://chat.example:443",
            "HTTPS://CHAT.EXAMPLE",
            "http://10.0.0.7:3000",
            "https://xn--bcher-kva.example",
        ] {
            assert!(passes(list, origin), "{origin}");
        }
        for origin in [
            "http://chat.example",
            "https://chat.example:8443",
            "https://chat.example.evil.com",
            "https://evil.com.chat.example",
            "https://a.chat.example",
            "http://10.0.0.7",
            "http://10.0.0.73000",
            "http://localhost",
            "https://b%C3%BCcher.example.evil.com",
            "null",
        ] {
            assert!(!passes(list, origin), "{origin}");
        }
    }

    #[test]
    fn a_star_is_the_web_and_other_origins_are_listed_exactly() {
        assert!(passes("*", "https://anything.example:1") && passes("*", "http://[2001:db8::1]"));
        for opaque in
            ["null", "tauri://localhost", "app://obsidian.md", "chrome-extension://abcdef", "file://"]
        {
            assert!(!passes("*", opaque) && !passes("localhost,https://a.example", opaque), "{opaque}");
            assert!(passes(&format!("*,{opaque}"), opaque), "{opaque}");
            assert!(!passes(opaque, &format!("{opaque}x")), "{opaque}");
        }
        assert!(!passes("tauri://localhost", "http://localhost") && !passes("null", "http://null"));
    }

    #[test]
    fn a_page_of_the_same_host_passes_unless_its_name_may_have_been_rebound() {
        let permits = |list: &str, origin: &str, authority: Option<&str>, needs_key| {
            allowed(list).permits(&origin.parse().unwrap(), authority, needs_key)
        };
        let list = "https://chat.example";
        for (origin, authority) in [
            ("http://192.168.1.5:8000", "192.168.1.5:8000"),
            ("http://[fd00::5]:8000", "[FD00::5]:8000"),
            ("http://localhost:8000", "localhost:8000"),
            ("http://10.0.0.1", "10.0.0.1:80"),
            ("https://10.0.0.1", "10.0.0.1"),
            ("http://chat.example:8000", "chat.example:8000"),
        ] {
            assert!(permits(list, origin, Some(authority), false), "{origin} {authority}");
        }
        let rebound = ("http://evil.example:8000", Some("evil.example:8000"));
        assert!(!permits(list, rebound.0, rebound.1, false));
        assert!(permits(list, rebound.0, rebound.1, true), "it has no key");
        for (origin, authority) in [
            ("http://10.0.0.1:8000", Some("10.0.0.1:8001")),
            ("https://10.0.0.1", Some("10.0.0.1:80")),
            ("http://10.0.0.1", Some("10.0.0.1:80@evil.example")),
            ("http://10.0.0.1", Some("10.0.0.1/")),
            ("http://10.0.0.1", Some("")),
            ("http://10.0.0.1", None),
            ("null", Some("null")),
            ("tauri://10.0.0.1", Some("10.0.0.1")),
        ] {
            assert!(!permits(list, origin, authority, true), "{origin} {authority:?}");
        }
    }

    #[test]
    fn a_wrong_list_says_what_is_wrong_with_which_entry() {
        for (list, words) in [
            ("", "empty entry"),
            ("http://a.example,", "empty entry"),
            ("chat.example", "\"chat.example\" has no scheme"),
            ("https://chat.example/", "\"https://chat.example/\" must be a scheme, a host"),
            ("https://user@chat.example", "must be a scheme, a host"),
            ("https://*.chat.example", "has a `*` in it"),
            ("http://localhost:*", "`localhost` for every port"),
            ("http://a.example http://b.example", "visible ASCII"),
            ("https://bücher.example", "Punycode"),
            ("https://chat.example:70000", "host or port that cannot be read"),
            ("https://", "cannot be read"),
            ("NULL", "has no scheme"),
            ("1x://a", "has a scheme that cannot be read"),
        ] {
            let error = list.parse::<AllowedOrigins>().unwrap_err();
            assert!(error.contains(words), "{list}: {error}");
        }
        let many = vec!["http://a.example"; MAX_LISTED + 1].join(",");
        assert!(many.parse::<AllowedOrigins>().unwrap_err().contains("at most 256"));
        assert_eq!(allowed("localhost"), AllowedOrigins::default());
    }
}
