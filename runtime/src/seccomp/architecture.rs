//! The architectures that a profile can name, and those whose programs this kernel runs.

/// An architecture whose calls can reach this kernel or one that rrun runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Architecture {
    X86_64,
    X32,
    X86,
    Aarch64,
    Arm,
}

/// Every name of the specification (config-linux.md, "Seccomp"), in alphabetical order.
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
    /// The architecture of a name; `None` for those that neither kernel runs programs of.
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

    /// `AUDIT_ARCH_*` of linux/audit.h, as seccomp_data.arch has it. x32 has x86-64's.
    pub(crate) fn audit(self) -> u32 {
        match self {
            Architecture::X86_64 | Architecture::X32 => 0xc000_003e,
            Architecture::X86 => 0x4000_0003,
            Architecture::Aarch64 => 0xc000_00b7,
            Architecture::Arm => 0x4000_0028,
        }
    }

    /// Whether arguments are compared as 64 bits. Those of the others are 32 bits wide: the
    /// upper half of a register is not theirs (x32), or always 0.
    pub(crate) fn is_wide(self) -> bool {
        matches!(self, Architecture::X86_64 | Architecture::Aarch64)
    }

    /// Whether a kernel that is `native` runs programs of this architecture.
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
