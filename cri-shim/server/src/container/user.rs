//! Resolves the user that a container's process runs as. The request or the image specifies the
//! user, and the image's passwd(5) and group(5) define the ids. An attacker can control the
//! contents of the image's files.

use std::fs::File;
use std::path::Path;
use std::sync::Mutex;

use rrun_proto::v1::{LinuxContainerSecurityContext, SupplementalGroupsPolicy};
use rustix::fs::OFlags;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::in_root::InRoot;
use rrun_calls::error::{During, Error, Result};
use rrun_calls::lock::lock;
use rrun_kernel::id::{self, Named};
use rrun_kernel::procfs::Procfs;
use rrun_kernel::regular_file::{self, Unfit};

/// The maximum size in bytes of the files passwd and group. A larger file is refused, because a
/// truncated file could give one user the ids of another user.
const MAX_FILE_BYTES: u64 = 4 << 20;

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct User {
    pub uid: u32,
    pub gid: u32,
    /// The group ids of the process without duplicates, beginning with `gid`.
    pub groups: Vec<u32>,
}

/// The size in bytes from which only one pair of files is in memory at a time. The files of most images
/// are far smaller.
const LARGE_FILES_BYTES: u64 = 256 << 10;

const PASSWD: &str = "etc/passwd";
const GROUP: &str = "etc/group";

/// Held while the server uses large files.
static LARGE_FILES: Mutex<()> = Mutex::new(());

/// The contents of an image's passwd and group files. A field is empty if its file does not exist.
#[derive(Default)]
pub(crate) struct Accounts {
    passwd: Vec<u8>,
    group: Vec<u8>,
}

impl Accounts {
    /// Returns accounts with these contents of passwd and group.
    #[cfg(feature = "fuzz")]
    pub(crate) fn of_files(passwd: Vec<u8>, group: Vec<u8>) -> Self {
        Accounts { passwd, group }
    }

    /// Reads etc/passwd and etc/group in `rootfs`, and passes them to `with`. Symbolic links can't lead
    /// outside `rootfs`. The author of an image determines the sizes of these files. So if they are large,
    /// this function waits until no other call of it uses large files. This call blocks.
    pub(crate) fn read<T>(rootfs: &Path, with: impl FnOnce(&Accounts) -> Result<T>) -> Result<T> {
        let root =
            InRoot::open(rootfs).during(|| "open the image's root file system".to_owned())?;
        // O_DIRECTORY: this is /proc itself.
        let procfs = Procfs::open().map_err(|error| unfit_error(PASSWD, &error.into()))?;
        let (passwd, group) = (open(&procfs, &root, PASSWD)?, open(&procfs, &root, GROUP)?);
        let bytes = passwd.size.saturating_add(group.size);
        let _turn = (bytes > LARGE_FILES_BYTES).then(|| lock(&LARGE_FILES));
        with(&Accounts {
            passwd: passwd.read()?,
            group: group.read()?,
        })
    }

    /// Returns (name, uid, gid) for each well-formed line of the image's passwd file.
    fn users(&self) -> impl Iterator<Item = (&[u8], u32, u32)> {
        lines(&self.passwd).filter_map(|mut fields| {
            let name = fields.next()?;
            let uid = parse(fields.nth(1)?)?;
            let gid = parse(fields.next()?)?;
            Some((name, uid, gid))
        })
    }

    /// Returns (name, gid, members) for each well-formed line of the image's group file.
    fn groups(&self) -> impl Iterator<Item = (&[u8], u32, &[u8])> {
        lines(&self.group).filter_map(|mut fields| {
            let name = fields.next()?;
            let gid = parse(fields.nth(1)?)?;
            Some((name, gid, fields.next().unwrap_or_default()))
        })
    }

    fn group(&self, name: &str) -> Result<u32> {
        if let Some(gid) = by_number(name, "group")? {
            return Ok(gid);
        }
        let mut groups = self.groups();
        groups
            .find(|(known, ..)| *known == name.as_bytes())
            .map(|(_, gid, _)| gid)
            .ok_or_else(|| Error::invalid(format!("the image's /etc/group has no group {name:?}")))
    }

    /// Resolves the user that the request specifies. If the request does not specify a user,
    /// resolves the image's user (`user[:group]`).
    pub(crate) fn resolve(
        &self,
        context: Option<&LinuxContainerSecurityContext>,
        image_user: &str,
    ) -> Result<User> {
        let default = LinuxContainerSecurityContext::default();
        let context = context.unwrap_or(&default);
        let requested = requested_user(context)?;
        let run_as_group = requested_group(context, requested.is_some())?;
        let (image_name, image_group) = match image_user.split_once(':') {
            Some((name, group)) => (name, Some(group)),
            None => (image_user, None),
        };
        // The image's group is used only if the image's user is used.
        let image_group = image_group.filter(|group| requested.is_none() && !group.is_empty());
        let name = requested.as_deref().unwrap_or(image_name);
        let account = self.account(if name.is_empty() { "0" } else { name })?;
        let gid = match (run_as_group, image_group) {
            (Some(gid), _) => gid,
            (None, Some(group)) => self.group(group)?,
            (None, None) => account.gid,
        };
        let mut groups = vec![gid];
        if context.supplemental_groups_policy() == SupplementalGroupsPolicy::Merge
            && let Some(login) = account.login
        {
            groups.extend(self.groups_of(login));
        }
        for group in &context.supplemental_groups {
            groups.push(number(*group, "supplemental_groups")?);
        }
        let mut ids = std::iter::once(account.uid).chain(groups.iter().copied());
        if let Some(id) = ids.find(|id| !id::is_valid(*id)) {
            return Err(Error::invalid(format!(
                "the image's /etc/passwd or /etc/group gives the user {name:?} the id {id}, which is not a valid id"
            )));
        }
        let mut seen = std::collections::HashSet::new();
        groups.retain(|gid| seen.insert(*gid));
        Ok(User {
            uid: account.uid,
            gid,
            groups,
        })
    }

    /// Returns the account for a user name or a user id. A user id is valid even without an entry
    /// in the image's passwd.
    fn account(&self, name: &str) -> Result<Account<'_>> {
        let by_number = by_number(name, "user")?;
        let entry = self.users().find(|(known, uid, _)| match by_number {
            Some(number) => *uid == number,
            None => *known == name.as_bytes(),
        });
        match (entry, by_number) {
            (Some((login, uid, gid)), _) => Ok(Account {
                login: Some(login),
                uid,
                gid,
            }),
            (None, Some(uid)) => Ok(Account {
                login: None,
                uid,
                gid: 0,
            }),
            (None, None) => Err(Error::invalid(format!(
                "the image's /etc/passwd has no user {name:?}"
            ))),
        }
    }

    /// Returns the ids of the groups that list the user `login` as a member.
    fn groups_of<'a>(&'a self, login: &'a [u8]) -> impl Iterator<Item = u32> + 'a {
        let contains =
            move |members: &[u8]| members.split(|byte| *byte == b',').any(|it| it == login);
        self.groups()
            .filter(move |(_, _, members)| contains(members))
            .map(|(_, gid, _)| gid)
    }
}

/// An open file of an image, or a file that the image does not have.
struct AccountFile {
    path: &'static str,
    file: Option<File>,
    size: u64,
}

fn open(procfs: &Procfs, root: &InRoot, path: &'static str) -> Result<AccountFile> {
    let found = match root.find(path) {
        Ok(found) => regular_file::reopen_by(procfs, found, OFlags::RDONLY).map(Some),
        Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
        Err(errno) => Err(Unfit::Kernel(errno)),
    };
    let (file, size) = match found.map_err(|unfit| unfit_error(path, &unfit))? {
        Some((file, stat)) => (Some(file), u64::try_from(stat.st_size).unwrap_or(0)),
        None => (None, 0),
    };
    Ok(AccountFile { path, file, size })
}

impl AccountFile {
    fn read(self) -> Result<Vec<u8>> {
        match self.file {
            Some(file) => regular_file::read(file, MAX_FILE_BYTES)
                .map_err(|unfit| unfit_error(self.path, &unfit)),
            None => Ok(Vec::new()),
        }
    }
}

fn unfit_error(path: &str, unfit: &Unfit) -> Error {
    let file = format!("{path} in the image's root file system");
    Error::of_file(unfit.errno(), unfit.sentence(&file))
}

/// Returns the fields of each line of a passwd or group file.
fn lines(text: &[u8]) -> impl Iterator<Item = impl Iterator<Item = &[u8]>> {
    text.split(|byte| *byte == b'\n').map(|line| {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        line.split(|byte| *byte == b':')
    })
}

fn parse(field: &[u8]) -> Option<u32> {
    std::str::from_utf8(field).ok()?.parse().ok()
}

/// A user's account. `login` is `None` if the image's passwd does not contain the user.
struct Account<'a> {
    login: Option<&'a [u8]>,
    uid: u32,
    gid: u32,
}

/// Returns the user in the request, or `None` if the request does not specify a user.
fn requested_user(context: &LinuxContainerSecurityContext) -> Result<Option<String>> {
    match (&context.run_as_user, context.run_as_username.as_str()) {
        (Some(_), name) if !name.is_empty() => Err(Error::invalid(
            "run_as_user and run_as_username are both set",
        )),
        (Some(uid), _) => Ok(Some(number(uid.value, "run_as_user")?.to_string())),
        (None, "") => Ok(None),
        (None, name) => Ok(Some(name.to_owned())),
    }
}

fn requested_group(
    context: &LinuxContainerSecurityContext,
    names_a_user: bool,
) -> Result<Option<u32>> {
    match &context.run_as_group {
        Some(_) if !names_a_user => Err(Error::invalid(
            "run_as_group is set without run_as_user or run_as_username",
        )),
        Some(gid) => Ok(Some(number(gid.value, "run_as_group")?)),
        None => Ok(None),
    }
}

/// Returns a numeric field of a request as an id.
pub(crate) fn number(value: i64, field: &str) -> Result<u32> {
    u32::try_from(value)
        .ok()
        .filter(|value| id::is_valid(*value))
        .ok_or_else(|| Error::invalid(format!("{field} is {value}, which is not a valid id")))
}

/// Returns the id if `text` is a number, or `None` if `text` is a name. `kind` is "user" or
/// "group".
fn by_number(text: &str, kind: &str) -> Result<Option<u32>> {
    match Named::parse(text) {
        Named::Name => Ok(None),
        Named::Id(id) => Ok(Some(id)),
        Named::Invalid => Err(Error::invalid(format!(
            "the {kind} {text} is a number, but not a valid id (0 to {})",
            id::LARGEST
        ))),
    }
}

#[cfg(test)]
mod tests {
    use rrun_proto::v1::Int64Value;

    use super::*;

    fn accounts() -> Accounts {
        Accounts {
            passwd: b"root:x:0:0:root:/:/bin/sh\nbroken\nwww:x:33:34::/:/bin/sh\n\
                      latin:x:60:61:J\xfcrgen:/:/bin/sh\r\n\xff:x:70:71::/:/bin/sh\n"
                .into(),
            group: b"root:x:0:\nwww:x:34:\ncdrom:x:24:root,www\naudio:x:29:www\nbad:x:y:www\n\
                     odd:x:72:\xff,www\n"
                .into(),
        }
    }

    fn user(uid: u32, gid: u32, groups: &[u32]) -> User {
        User {
            uid,
            gid,
            groups: groups.to_vec(),
        }
    }

    fn context(uid: Option<i64>, gid: Option<i64>) -> LinuxContainerSecurityContext {
        LinuxContainerSecurityContext {
            run_as_user: uid.map(|value| Int64Value { value }),
            run_as_group: gid.map(|value| Int64Value { value }),
            ..Default::default()
        }
    }

    #[test]
    fn the_images_user_is_resolved_by_name_number_and_group() -> Result<()> {
        let all = accounts();
        assert_eq!(all.resolve(None, "")?, user(0, 0, &[0, 24]));
        assert_eq!(all.resolve(None, "www")?, user(33, 34, &[34, 24, 29, 72]));
        assert_eq!(all.resolve(None, "latin")?, user(60, 61, &[61]));
        assert_eq!(all.resolve(None, "70")?, user(70, 71, &[71, 72]));
        assert_eq!(all.resolve(None, "33:cdrom")?, user(33, 24, &[24, 29, 72]));
        assert_eq!(all.resolve(None, "1000")?, user(1000, 0, &[0]));
        assert_eq!(
            all.resolve(None, "1000:50000")?,
            user(1000, 50000, &[50000])
        );
        Ok(())
    }

    #[test]
    fn the_requested_user_wins_over_the_images_user() -> Result<()> {
        let all = accounts();
        let requested = context(Some(33), None);
        assert_eq!(
            all.resolve(Some(&requested), "5:6")?,
            user(33, 34, &[34, 24, 29, 72])
        );
        let mut requested = context(Some(33), Some(7));
        requested.supplemental_groups = vec![24, 99];
        assert_eq!(
            all.resolve(Some(&requested), "")?,
            user(33, 7, &[7, 24, 29, 72, 99])
        );
        requested.set_supplemental_groups_policy(SupplementalGroupsPolicy::Strict);
        assert_eq!(
            all.resolve(Some(&requested), "")?,
            user(33, 7, &[7, 24, 99])
        );
        Ok(())
    }

    #[test]
    fn unknown_and_contradictory_users_are_refused() {
        let all = accounts();
        let mut refused = vec![
            all.resolve(None, "nobody"),
            all.resolve(None, "root:nogroup"),
            all.resolve(Some(&context(None, Some(1))), ""),
            all.resolve(Some(&context(Some(-1), None)), ""),
            all.resolve(Some(&context(Some(i64::from(u32::MAX)), None)), ""),
        ];
        let mut both = context(Some(1), None);
        both.run_as_username = "www".into();
        refused.push(all.resolve(Some(&both), ""));
        let odd = Accounts {
            passwd: b"4294967296:x:0:0::/:\n-0:x:0:0::/:\nevil:x:4294967295:0::/:\n\
                     gid:x:5:4294967295::/:\nmember:x:6:6::/:\n"
                .into(),
            group: b"4294967296:x:0:\nnone:x:4294967295:member\n".into(),
        };
        for user in [
            "4294967295",
            "4294967296",
            "18446744073709551616",
            "-0",
            "-1",
            "+1000",
            " 0",
            "evil",
            "gid",
            "member",
            "0:none",
            "0:4294967295",
            "0:4294967296",
            "0:-0",
        ] {
            refused.push(odd.resolve(None, user));
        }
        let mut requested = context(None, None);
        requested.run_as_username = "4294967296".into();
        refused.push(odd.resolve(Some(&requested), ""));
        let mut requested = context(Some(0), Some(i64::from(u32::MAX)));
        refused.push(odd.resolve(Some(&requested), ""));
        requested.run_as_group = None;
        requested.supplemental_groups = vec![1 << 32];
        refused.push(odd.resolve(Some(&requested), ""));
        for result in refused {
            assert!(
                result.is_err_and(|error| error.code() == tonic::Code::InvalidArgument),
                "an invalid user was accepted"
            );
        }
    }
}
