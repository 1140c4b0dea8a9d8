//! The architectures that a seccomp profile can name, and the architectures whose programs this
//! kernel can run.

/// An architecture for which a container's program can be compiled. An x86-64 kernel also runs x32
/// and 32-bit x86 programs, and an arm64 kernel also runs 32-bit Arm programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Architecture {
    X86_64,
    X32,
    X86,
    Aarch64,
    Arm,
}

/// All architecture names of the specification (config-linux.md, "Seccomp"), in alphabetical order.
pub(crate) const NAMES: [&str; 23] = [
    "SCMP_ARCH_AARCH64",
    "SCMP_ARCH_ARM",
    "SCMP_ARCH_LOONGARCH64",
    "SCMP_ARCH_M68K",
    "SCMP_ARCH_MIPS",
    "SCMP_ARCH_MIPS64",
    "SCMP_ARCH_MIPS64N32",
    "SCMP_ARCH_MIPSEL",
    "SCMP_ARCH_MIPSEL64",
    "SCMP_ARCH_MIPSEL64N32",
    "SCMP_ARCH_PARISC",
    "SCMP_ARCH_PARISC64",
    "SCMP_ARCH_PPC",
    "SCMP_ARCH_PPC64",
    "SCMP_ARCH_PPC64LE",
    "SCMP_ARCH_RISCV64",
    "SCMP_ARCH_S390",
    "SCMP_ARCH_S390X",
    "SCMP_ARCH_SH",
    "SCMP_ARCH_SHEB",
    "SCMP_ARCH_X32",
    "SCMP_ARCH_X86",
    "SCMP_ARCH_X86_64",
];

#[cfg(target_arch = "x86_64")]
pub(crate) const NATIVE: Architecture = Architecture::X86_64;
#[cfg(target_arch = "aarch64")]
pub(crate) const NATIVE: Architecture = Architecture::Aarch64;

impl Architecture {
    /// Returns the architecture with this name, or `None` if neither an x86-64 nor an arm64 kernel
    /// runs programs of this architecture.
    pub(crate) fn by_name(name: &str) -> Option<Architecture> {
        match name {
            "SCMP_ARCH_X86_64" => Some(Architecture::X86_64),
            "SCMP_ARCH_X32" => Some(Architecture::X32),
            "SCMP_ARCH_X86" => Some(Architecture::X86),
            "SCMP_ARCH_AARCH64" => Some(Architecture::Aarch64),
            "SCMP_ARCH_ARM" => Some(Architecture::Arm),
            _ => None,
        }
    }

    /// Returns the `AUDIT_ARCH_*` value (linux/audit.h) that seccomp_data.arch contains for
    /// programs of this architecture. x32 has the same value as x86-64.
    pub(crate) fn audit(self) -> u32 {
        match self {
            Architecture::X86_64 | Architecture::X32 => 0xc000_003e,
            Architecture::X86 => 0x4000_0003,
            Architecture::Aarch64 => 0xc000_00b7,
            Architecture::Arm => 0x4000_0028,
        }
    }

    /// Returns whether the filter compares all 64 bits of an argument. On all architectures except
    /// x86-64 and arm64, an argument has 32 bits. On such an architecture, the upper half of the
    /// 64-bit field in seccomp_data is always 0, or is not part of the argument (x32).
    pub(crate) fn is_wide(self) -> bool {
        matches!(self, Architecture::X86_64 | Architecture::Aarch64)
    }

    /// Returns whether a kernel with the architecture `native` runs programs of this architecture.
    pub(crate) fn runs_on(self, native: Architecture) -> bool {
        match native {
            Architecture::Aarch64 => matches!(self, Architecture::Aarch64 | Architecture::Arm),
            _ => matches!(
                self,
                Architecture::X86_64 | Architecture::X32 | Architecture::X86
            ),
        }
    }
}
