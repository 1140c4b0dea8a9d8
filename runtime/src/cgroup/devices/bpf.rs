//! The bpf(2) calls that put a program of ours on a cgroup, find it there and replace it.

use std::os::fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd};

use rustix::io::Errno;

use super::program::BpfInsn;

type BpfResult<T> = std::result::Result<T, Errno>;

// linux/bpf.h, enum bpf_cmd, bpf_prog_type, bpf_attach_type
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_PROG_ATTACH: libc::c_int = 8;
const BPF_PROG_DETACH: libc::c_int = 9;
const BPF_PROG_GET_FD_BY_ID: libc::c_int = 13;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const BPF_PROG_QUERY: libc::c_int = 16;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;
/// A container that divides its cgroup may add programs, which only restrict; so may systemd.
const BPF_F_ALLOW_MULTI: u32 = 2;
const BPF_F_REPLACE: u32 = 4;

/// By which ours is told from systemd's on the same cgroup.
const NAME: [u8; 16] = *b"rrun_devices\0\0\0\0";
/// The kernel allows that many on one cgroup (BPF_CGROUP_MAX_PROGS).
const PROGRAMS_MAX: usize = 64;

/// `union bpf_attr` for BPF_PROG_LOAD, as far as it is used.
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

/// The same for BPF_PROG_ATTACH and BPF_PROG_DETACH.
#[repr(C)]
struct AttachAttributes {
    target_fd: u32,
    attach_bpf_fd: u32,
    attach_type: u32,
    attach_flags: u32,
    replace_bpf_fd: u32,
}

/// The same for BPF_PROG_QUERY.
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

/// The same for BPF_OBJ_GET_INFO_BY_FD.
#[repr(C)]
struct InfoAttributes {
    bpf_fd: u32,
    info_len: u32,
    info: u64,
}

/// `struct bpf_prog_info` up to the program's name.
#[repr(C)]
#[derive(Default)]
struct ProgramInfo {
    before: [u64; 8],
    name: [u8; 16],
}

fn bpf<A>(command: libc::c_int, attributes: &mut A) -> BpfResult<i32> {
    // SAFETY: attributes is a prefix of bpf_attr of the length given, and what it points to
    // outlives the call; the kernel takes what is missing as zero.
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

/// The same for the commands that return a descriptor.
fn bpf_fd<A>(command: libc::c_int, attributes: &mut A) -> BpfResult<OwnedFd> {
    let fd = bpf(command, attributes)?;
    // SAFETY: a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

pub(crate) fn load(code: &[BpfInsn]) -> BpfResult<OwnedFd> {
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

/// Puts a program on a cgroup, in the place of another if one is given: at no moment is
/// there none.
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

/// The program of rrun's that is on a cgroup.
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
        // In this command's attributes, the id is all that is set.
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
