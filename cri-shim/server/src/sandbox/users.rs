//! The pod's user namespace: which ids of the node its ids are.

use rrun_proto::v1::{IdMapping, NamespaceMode, PodSandboxConfig, UserNamespace};

use super::namespaces;
use rrun_calls::error::{Error, Result};
use rrun_protocol::IdMaps;

/// The most ranges that the kernel takes in a map, user_namespaces(7).
const MAX_RANGES: usize = 340;

/// The ranges of a pod with a user namespace of its own.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Mappings {
    pub uids: Vec<IdMapping>,
    pub gids: Vec<IdMapping>,
}

/// The pod's ranges; `None`: its ids are the node's.
pub(crate) fn mappings(config: &PodSandboxConfig) -> Result<Option<Mappings>> {
    match namespaces::options(config).userns_options {
        Some(options) => read(&options),
        None => Ok(None),
    }
}

/// What the options ask for.
pub(crate) fn read(options: &UserNamespace) -> Result<Option<Mappings>> {
    match options.mode() {
        NamespaceMode::Node if options.uids.is_empty() && options.gids.is_empty() => Ok(None),
        NamespaceMode::Node => Err(Error::invalid(
            "userns_options has the mode NODE and ids to map, which contradict each other",
        )),
        NamespaceMode::Pod => {
            check("uids", &options.uids)?;
            check("gids", &options.gids)?;
            Ok(Some(Mappings {
                uids: options.uids.clone(),
                gids: options.gids.clone(),
            }))
        }
        other => Err(Error::invalid(format!(
            "userns_options has the mode {}, it can be POD or NODE",
            other.as_str_name()
        ))),
    }
}

/// Refuses ranges that the kernel would, and a namespace without a root. `field` is for the error.
pub(crate) fn check(field: &str, ranges: &[IdMapping]) -> Result<()> {
    let refuse = |why: &str| {
        let shown: Vec<String> = ranges.iter().map(line).collect();
        let shown = shown.concat().replace('\n', ", ");
        Err(Error::invalid(format!(
            "the {field} of a user namespace ({shown}inside, outside, length) {why}"
        )))
    };
    if ranges.is_empty() || ranges.len() > MAX_RANGES {
        return refuse("are no ranges, or too many");
    }
    if outside(ranges, 0).is_none() {
        return refuse("lack the id 0");
    }
    for (at, one) in ranges.iter().enumerate() {
        let fits = |first: u32| one.length > 0 && first.checked_add(one.length - 1).is_some();
        if !fits(one.host_id) || !fits(one.container_id) {
            return refuse("have a range that is empty or too long");
        }
        let overlap = |a: u32, b: u32, other: &IdMapping| {
            u64::from(a) < u64::from(b) + u64::from(other.length)
                && u64::from(b) < u64::from(a) + u64::from(one.length)
        };
        let clash = ranges.iter().skip(at + 1).any(|other| {
            overlap(one.host_id, other.host_id, other)
                || overlap(one.container_id, other.container_id, other)
        });
        if clash {
            return refuse("have ranges that overlap");
        }
    }
    Ok(())
}

fn line(range: &IdMapping) -> String {
    format!(
        "{} {} {}\n",
        range.container_id, range.host_id, range.length
    )
}

/// The node's id of an id inside.
pub(crate) fn outside(ranges: &[IdMapping], id: u32) -> Option<u32> {
    ranges.iter().find_map(|range| {
        let offset = id.checked_sub(range.container_id)?;
        (offset < range.length).then(|| range.host_id.checked_add(offset))?
    })
}

impl Mappings {
    /// For the monitor, which makes the namespace.
    pub(crate) fn for_monitor(&self) -> IdMaps {
        IdMaps {
            uid_map: self.uids.iter().map(line).collect(),
            gid_map: self.gids.iter().map(line).collect(),
        }
    }

    /// The node's ids of the pod's root user and group.
    pub(crate) fn root(&self) -> (u32, u32) {
        let id = |ranges: &[IdMapping]| outside(ranges, 0).unwrap_or_default();
        (id(&self.uids), id(&self.gids))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(container_id: u32, host_id: u32, length: u32) -> IdMapping {
        IdMapping {
            host_id,
            container_id,
            length,
        }
    }

    #[test]
    fn ranges_say_whose_ids_the_pods_are() -> Result<()> {
        let options = UserNamespace {
            mode: NamespaceMode::Pod.into(),
            uids: vec![range(0, 65536, 65536)],
            gids: vec![range(5, 7, 1), range(0, 131_072, 5)],
        };
        let Some(mappings) = read(&options)? else {
            panic!("no user namespace");
        };
        assert_eq!(mappings.root(), (65536, 131_072));
        assert_eq!(outside(&mappings.gids, 5), Some(7));
        assert_eq!(outside(&mappings.uids, 65536), None);
        assert_eq!(mappings.for_monitor().gid_map, "5 7 1\n0 131072 5\n");
        Ok(())
    }

    #[test]
    fn what_the_kernel_would_refuse_is_refused_by_name() {
        let wrong = [
            vec![],
            vec![range(1, 1000, 10)],
            vec![range(0, 1000, 0)],
            vec![range(0, u32::MAX, 2)],
            vec![range(0, 1000, 10), range(10, 1009, 10)],
            vec![range(0, 1000, 10), range(9, 2000, 10)],
        ];
        for ranges in wrong {
            let refused = check("uids", &ranges);
            assert!(
                refused.is_err_and(|error| error.sentence().contains("the uids")),
                "{ranges:?} were taken"
            );
        }
        let node = UserNamespace {
            mode: NamespaceMode::Node.into(),
            uids: vec![range(0, 1, 1)],
            gids: vec![],
        };
        assert!(read(&node).is_err());
    }
}
