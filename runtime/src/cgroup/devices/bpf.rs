//! The bpf(2) calls that attach rrun's device program to a cgroup, find the attached program, and
//! replace the attached program.

use std::os::fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd};

use rustix::io::Errno;

use super::program::BpfInsn;

type BpfResult<T> = std::result::Result<T, Errno>;

// These constants are from linux/bpf.h: enum bpf_cmd, enum bpf_prog_type and enum bpf_attach_type.
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_PROG_ATTACH: libc::c_int = 8;
const BPF_PROG_DETACH: libc::c_int = 9;
const BPF_PROG_GET_FD_BY_ID: libc::c_int = 13;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const BPF_PROG_QUERY: libc::c_int = 16;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;
/// The flag that allows further device programs on the same cgroup and on the cgroups below it. A
/// container can add programs to its child cgroups, and systemd can add its own program. A further
/// program can only restrict access, so the container cannot use it to gain access to a device.
const BPF_F_ALLOW_MULTI: u32 = 2;
const BPF_F_REPLACE: u32 = 4;

/// The name of rrun's BPF program. rrun uses this name to distinguish its program from systemd's
/// program on the same cgroup.
const NAME: [u8; 16] = *b"rrun_devices\0\0\0\0";
/// The maximum number of programs that the kernel allows on one cgroup (BPF_CGROUP_MAX_PROGS).
const PROGRAMS_MAX: usize = 64;

/// The maximum number of attempts to load a program. libbpf makes the same number of attempts.
const LOAD_ATTEMPTS: usize = 5;

/// The part of `union bpf_attr` that rrun uses for BPF_PROG_LOAD.
#[repr(C)]
struct LoadAttributes {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
}

/// The part of `union bpf_attr` that rrun uses for BPF_PROG_ATTACH and BPF_PROG_DETACH.
#[repr(C)]
struct AttachAttributes {
    target_fd: u32,
    attach_bpf_fd: u32,
    attach_type: u32,
    attach_flags: u32,
    replace_bpf_fd: u32,
}

/// The part of `union bpf_attr` that rrun uses for BPF_PROG_QUERY.
#[repr(C)]
struct QueryAttributes {
    target_fd: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    prog_ids: u64,
    prog_cnt: u32,
    padding: u32,
}

/// The part of `union bpf_attr` that rrun uses for BPF_OBJ_GET_INFO_BY_FD.
#[repr(C)]
struct InfoAttributes {
    bpf_fd: u32,
    info_len: u32,
    info: u64,
}

/// The start of `struct bpf_prog_info`, up to the program's name.
#[repr(C)]
#[derive(Default)]
struct ProgramInfo {
    before: [u64; 8],
    name: [u8; 16],
}

fn bpf<A>(command: libc::c_int, attributes: &mut A) -> BpfResult<i32> {
    // SAFETY: `attributes` is a prefix of bpf_attr with the given length. The pointers in
    // `attributes` refer to memory that outlives the call. The kernel treats the missing fields as
    // zero.
    let returned = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            attributes as *mut A,
            std::mem::size_of::<A>(),
        )
    };
    if returned < 0 {
        let error = std::io::Error::last_os_error();
        return Err(Errno::from_io_error(&error).unwrap_or(Errno::IO));
    }
    Ok(returned as i32)
}

/// Makes a bpf(2) call that returns a new descriptor.
fn bpf_fd<A>(command: libc::c_int, attributes: &mut A) -> BpfResult<OwnedFd> {
    let fd = bpf(command, attributes)?;
    // SAFETY: the kernel returned a new descriptor, which has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Loads a device program. The kernel's verifier fails with EAGAIN if a signal arrives during the
/// check of the program, so this function repeats the call.
pub(crate) fn load(code: &[BpfInsn]) -> BpfResult<OwnedFd> {
    let mut loaded = try_load(code);
    for _ in 1..LOAD_ATTEMPTS {
        if !matches!(loaded, Err(Errno::AGAIN)) {
            break;
        }
        loaded = try_load(code);
    }
    loaded
}

fn try_load(code: &[BpfInsn]) -> BpfResult<OwnedFd> {
    bpf_fd(
        BPF_PROG_LOAD,
        &mut LoadAttributes {
            prog_type: BPF_PROG_TYPE_CGROUP_DEVICE,
            insn_cnt: code.len() as u32,
            insns: code.as_ptr() as u64,
            license: c"Apache-2.0".as_ptr() as u64,
            log_level: 0,
            log_size: 0,
            log_buf: 0,
            kern_version: 0,
            prog_flags: 0,
            prog_name: NAME,
        },
    )
}

/// Attaches a device program to a cgroup. If `old` is given, the new program replaces `old`
/// atomically, so that the cgroup always has a program.
pub(crate) fn attach(
    cgroup: &impl AsFd,
    program: &OwnedFd,
    old: Option<&OwnedFd>,
) -> BpfResult<()> {
    bpf(
        BPF_PROG_ATTACH,
        &mut AttachAttributes {
            target_fd: cgroup.as_fd().as_raw_fd() as u32,
            attach_bpf_fd: program.as_raw_fd() as u32,
            attach_type: BPF_CGROUP_DEVICE,
            attach_flags: BPF_F_ALLOW_MULTI | old.map_or(0, |_| BPF_F_REPLACE),
            replace_bpf_fd: old.map_or(0, |old| old.as_raw_fd() as u32),
        },
    )
    .map(|_| ())
}

pub(crate) fn detach(cgroup: &impl AsFd, program: &OwnedFd) -> BpfResult<()> {
    bpf(
        BPF_PROG_DETACH,
        &mut AttachAttributes {
            target_fd: cgroup.as_fd().as_raw_fd() as u32,
            attach_bpf_fd: program.as_raw_fd() as u32,
            attach_type: BPF_CGROUP_DEVICE,
            attach_flags: 0,
            replace_bpf_fd: 0,
        },
    )
    .map(|_| ())
}

/// Returns the device program that rrun attached to a cgroup earlier, if there is one.
pub(crate) fn attached(cgroup: &impl AsFd) -> BpfResult<Option<OwnedFd>> {
    let mut ids = [0u32; PROGRAMS_MAX];
    let mut query = QueryAttributes {
        target_fd: cgroup.as_fd().as_raw_fd() as u32,
        attach_type: BPF_CGROUP_DEVICE,
        query_flags: 0,
        attach_flags: 0,
        prog_ids: ids.as_mut_ptr() as u64,
        prog_cnt: PROGRAMS_MAX as u32,
        padding: 0,
    };
    bpf(BPF_PROG_QUERY, &mut query)?;
    for id in ids.iter().take(query.prog_cnt as usize) {
        // BPF_PROG_GET_FD_BY_ID needs only the program's id. The other attributes of this command
        // are zero.
        let program = bpf_fd(BPF_PROG_GET_FD_BY_ID, &mut [*id, 0, 0])?;
        let mut info = ProgramInfo::default();
        bpf(
            BPF_OBJ_GET_INFO_BY_FD,
            &mut InfoAttributes {
                bpf_fd: program.as_raw_fd() as u32,
                info_len: std::mem::size_of::<ProgramInfo>() as u32,
                info: &raw mut info as u64,
            },
        )?;
        if info.name == NAME {
            return Ok(Some(program));
        }
    }
    Ok(None)
}
