//! What this host can give a guest.

use std::fmt;
use std::fs;
use std::str::FromStr;

use rustix::system::sysinfo;
use serde::{Deserialize, Serialize};

use super::{ConfigError, Size};

/// Pages of the host that are larger than usual: fewer TLB misses, and nothing is shared or
/// swapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum HugePages {
    /// 2 MiB.
    #[serde(rename = "2M")]
    Size2M,
    /// 1 GiB.
    #[serde(rename = "1G")]
    Size1G,
}

impl HugePages {
    /// Bytes in one page.
    #[must_use]
    pub fn bytes(self) -> u64 {
        match self {
            HugePages::Size2M => 2 << 20,
            HugePages::Size1G => 1 << 30,
        }
    }

    /// How many pages of this size the host can still give; `None` if it knows no such size.
    ///
    /// Source: the Linux kernel's `admin-guide/mm/hugetlbpage.rst`.
    #[must_use]
    pub fn free(self) -> Option<u64> {
        let read = |file: &str| -> Option<u64> {
            fs::read_to_string(self.pool().with_file_name(file)).ok()?.trim().parse().ok()
        };
        let unclaimed = read("free_hugepages")?.saturating_sub(read("resv_hugepages")?);
        let surplus = read("nr_overcommit_hugepages")?.saturating_sub(read("surplus_hugepages")?);
        Some(unclaimed.saturating_add(surplus))
    }

    /// The file that sets how many pages there are.
    #[must_use]
    pub fn pool(self) -> std::path::PathBuf {
        format!("/sys/kernel/mm/hugepages/hugepages-{}kB/nr_hugepages", self.bytes() >> 10).into()
    }
}

impl FromStr for HugePages {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.parse() {
            Ok(Size(0x20_0000)) => Ok(HugePages::Size2M),
            Ok(Size(0x4000_0000)) => Ok(HugePages::Size1G),
            _ => Err(format!("{text:?} is not a size of huge pages: choose 2M or 1G")),
        }
    }
}

impl fmt::Display for HugePages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Size(self.bytes()).fmt(f)
    }
}

/// Refuses memory that this host could never back.
///
/// Memory is backed when the guest touches it, so this is not a promise: only what is
/// impossible whatever else runs is refused here.
pub(super) fn check_memory(memory: u64, pages: Option<HugePages>) -> Result<(), ConfigError> {
    let info = sysinfo();
    let unit = u64::from(info.mem_unit);
    let whole_mib = |units: u64| units.saturating_mul(unit) & !0xf_ffff;
    let (ram, swap) = (whole_mib(info.totalram), whole_mib(info.totalswap));
    let asked = Size(memory);
    if memory > ram.saturating_add(swap) {
        return Err(ConfigError::MemoryTooLarge {
            memory: asked,
            ram: Size(ram),
            swap: Size(swap),
        });
    }
    let Some(page) = pages else { return Ok(()) };
    if !memory.is_multiple_of(page.bytes()) {
        return Err(ConfigError::MemoryNotAligned { memory: asked, step: Size(page.bytes()) });
    }
    let free = free_pages(page)?;
    let needed = memory / page.bytes();
    if needed > free {
        let pool = page.pool().display().to_string();
        return Err(ConfigError::HugePages { memory: asked, page, needed, free, pool });
    }
    Ok(())
}

/// How many pages of this size the host can still give.
pub(super) fn free_pages(page: HugePages) -> Result<u64, ConfigError> {
    page.free().ok_or(ConfigError::NoHugePages(page))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_two_sizes_of_huge_pages_are_known() {
        assert_eq!("2M".parse(), Ok(HugePages::Size2M));
        assert_eq!("1g".parse(), Ok(HugePages::Size1G));
        assert_eq!(HugePages::Size1G.to_string().parse(), Ok(HugePages::Size1G));
        for text in ["", "4K", "4M", "two"] {
            assert!(text.parse::<HugePages>().is_err(), "{text}");
        }
    }

    #[test]
    fn memory_must_be_whole_huge_pages() {
        let odd = check_memory(65 << 20, Some(HugePages::Size2M)).unwrap_err();
        assert!(matches!(odd, ConfigError::MemoryNotAligned { .. }), "{odd}");
    }

    #[test]
    fn more_huge_pages_than_are_free_are_refused() {
        let Some(free) = HugePages::Size2M.free() else {
            eprintln!("skipped: this kernel has no huge pages of 2M");
            return;
        };
        let memory = (free + 1) * HugePages::Size2M.bytes();
        check_memory(memory, Some(HugePages::Size2M)).unwrap_err();
    }
}
