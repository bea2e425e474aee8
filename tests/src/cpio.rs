//! Writes cpio archives in the "newc" format, which Linux unpacks as an initramfs.
//!
//! Source: Documentation/driver-api/early-userspace/buffer-format.rst of Linux.
use std::io::{self, Write};

const DIRECTORY: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const LINK: u32 = 0o120_000;
const CHARACTER_DEVICE: u32 = 0o020_000;

/// An archive being written; [`Archive::finish`] ends it.
#[derive(Debug)]
pub struct Archive<W> {
    out: W,
    written: usize,
    inode: u32,
}

impl<W: Write> Archive<W> {
    /// Begins an archive on `out`.
    pub fn new(out: W) -> Self {
        Self { out, written: 0, inode: 0 }
    }

    /// Adds an empty directory. Parents come first.
    ///
    /// # Errors
    /// As `out` reports them.
    pub fn directory(&mut self, path: &str) -> io::Result<()> {
        self.entry(path, DIRECTORY | 0o755, (0, 0), &[])
    }

    /// Adds a file with the permission bits `mode`.
    ///
    /// # Errors
    /// As `out` reports them.
    pub fn file(&mut self, path: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        self.entry(path, FILE | mode, (0, 0), content)
    }

    /// Adds a symbolic link to `target`.
    ///
    /// # Errors
    /// As `out` reports them.
    pub fn link(&mut self, path: &str, target: &str) -> io::Result<()> {
        self.entry(path, LINK | 0o777, (0, 0), target.as_bytes())
    }

    /// Adds the character device `number` (major, minor).
    ///
    /// # Errors
    /// As `out` reports them.
    pub fn device(&mut self, path: &str, number: (u32, u32)) -> io::Result<()> {
        self.entry(path, CHARACTER_DEVICE | 0o600, number, &[])
    }

    /// Ends the archive and gives `out` back.
    ///
    /// # Errors
    /// As `out` reports them.
    pub fn finish(mut self) -> io::Result<W> {
        self.entry("TRAILER!!!", 0, (0, 0), &[])?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn entry(
        &mut self,
        path: &str,
        mode: u32,
        device: (u32, u32),
        content: &[u8],
    ) -> io::Result<()> {
        let too_large =
            |_| io::Error::new(io::ErrorKind::InvalidInput, format!("{path} is too large"));
        let size = u32::try_from(content.len()).map_err(too_large)?;
        let name_size = u32::try_from(path.len() + 1).map_err(too_large)?;
        self.inode += 1;
        // ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
        let fields = [self.inode, mode, 0, 0, 1, 0, size, 0, 0, device.0, device.1, name_size, 0];
        let mut header = String::from("070701");
        for field in fields {
            header.push_str(&format!("{field:08x}"));
        }
        header.push_str(path);
        header.push('\0');
        self.padded(header.as_bytes())?;
        self.padded(content)
    }

    fn padded(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.out.write_all(bytes)?;
        self.written += bytes.len();
        let padding = self.written.next_multiple_of(4) - self.written;
        self.written += padding;
        self.out.write_all(&[0; 3][..padding])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_is_laid_out_as_the_kernel_reads_it() {
        let mut archive = Archive::new(Vec::new());
        archive.directory("d").unwrap();
        archive.file("d/f", 0o755, b"hello").unwrap();
        let bytes = archive.finish().unwrap();
        assert_eq!(bytes.len() % 4, 0);
        assert_eq!(&bytes[..6], b"070701");
        let second = 112; // 110 bytes of header, "d\0", padded to four
        assert_eq!(&bytes[second..second + 6], b"070701");
        assert_eq!(&bytes[second + 14..second + 22], b"000081ed", "a file with mode 755");
        assert_eq!(&bytes[second + 54..second + 62], b"00000005", "five bytes long");
        assert_eq!(&bytes[second + 110..second + 114], b"d/f\0");
        assert_eq!(
            &bytes[second + 116..second + 124],
            b"hello\0\0\0",
            "padded after header and content"
        );
    }
}
