//! Owns the writing of numpy's file format, version 1.0.

use std::io::{self, Write};

use ndarray::ArrayView2;

/// Writes a float32 matrix.
///
/// # Errors
/// What the writer says.
pub(super) fn write(out: &mut impl Write, matrix: ArrayView2<'_, f32>) -> io::Result<()> {
    let (rows, columns) = matrix.dim();
    let mut header = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {columns}), }}");
    // Magic, version and length take 10 bytes; all of it is a multiple of 64 and ends with a newline.
    let padding = 63 - (10 + header.len()) % 64;
    header.extend(std::iter::repeat_n(' ', padding));
    header.push('\n');
    out.write_all(b"\x93NUMPY\x01\x00")?;
    out.write_all(&(header.len() as u16).to_le_bytes())?;
    out.write_all(header.as_bytes())?;
    matrix.iter().try_for_each(|value| out.write_all(&value.to_le_bytes()))
}

#[cfg(test)]
mod tests {
    use ndarray::array;

    use super::*;

    #[test]
    fn header_and_data_are_aligned() {
        let mut file = Vec::new();
        write(&mut file, array![[1f32, 2.0, 3.0], [4.0, 5.0, -6.5]].view()).unwrap();
        assert_eq!(file.len(), 128 + 24);
        assert_eq!(&file[..10], b"\x93NUMPY\x01\x00\x76\x00");
        assert!(file[10..128].starts_with(b"{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }"));
        assert_eq!(file[127], b'\n');
        assert_eq!(file[148..], (-6.5f32).to_le_bytes());
    }
}
