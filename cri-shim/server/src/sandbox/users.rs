//! The pod's user namespace: the mapping of user and group ids in the pod to ids on the node.

use rrun_proto::v1::{IdMapping, NamespaceMode, PodSandboxConfig, UserNamespace};

use super::namespaces;
use rrun_calls::error::{Error, Result};
use rrun_protocol::IdMaps;

/// The kernel's limit on the number of ranges in an id mapping, user_namespaces(7).
const MAX_RANGES: usize = 340;

/// The id mappings of a pod with its own user namespace.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Mappings {
    pub uids: Vec<IdMapping>,
    pub gids: Vec<IdMapping>,
}

/// Returns the pod's id mappings, or `None` if the pod uses the ids of the node.
pub(crate) fn mappings(config: &PodSandboxConfig) -> Result<Option<Mappings>> {
    match namespaces::options(config).userns_options {
        Some(options) => read(&options),
        None => Ok(None),
    }
}

/// Returns the id mappings in the options, or `None` if the options select the node's user
/// namespace.
pub(crate) fn read(options: &UserNamespace) -> Result<Option<Mappings>> {
    match options.mode() {
        NamespaceMode::Node if options.uids.is_empty() && options.gids.is_empty() => Ok(None),
        NamespaceMode::Node => Err(Error::invalid(
            "userns_options has the mode NODE, but also contains id mappings",
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
            "userns_options has the mode {}, but it must be POD or NODE",
            other.as_str_name()
        ))),
    }
}

/// Rejects mappings that the kernel would reject, and mappings without the id 0. `field` is the
/// name of the mappings' field in the request, for the error text.
pub(crate) fn check(field: &str, ranges: &[IdMapping]) -> Result<()> {
    let refuse = |why: &str| {
        let shown: String = ranges.iter().map(line).collect();
        let shown = shown.trim_end().replace('\n', ", ");
        Err(Error::invalid(format!(
            "the {field} of a user namespace: {why}; \
             the ranges (container id, host id, length) are [{shown}]"
        )))
    };
    if ranges.is_empty() || ranges.len() > MAX_RANGES {
        return refuse("the mapping is empty or has too many ranges");
    }
    if outside(ranges, 0).is_none() {
        return refuse("the container id 0 is not mapped");
    }
    for (at, one) in ranges.iter().enumerate() {
        // The last id of a range is less than u32::MAX, which is not an id.
        let fits = |first: u32| one.length > 0 && first.checked_add(one.length).is_some();
        if !fits(one.host_id) || !fits(one.container_id) {
            return refuse("a range is empty or too long");
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
            return refuse("two ranges overlap");
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

/// Returns the id on the node that corresponds to the id `id` in the user namespace.
pub(crate) fn outside(ranges: &[IdMapping], id: u32) -> Option<u32> {
    ranges.iter().find_map(|range| {
        let offset = id.checked_sub(range.container_id)?;
        (offset < range.length).then(|| range.host_id.checked_add(offset))?
    })
}

impl Mappings {
    /// Returns the mappings as text for the monitor, which creates the user namespace.
    pub(crate) fn for_monitor(&self) -> IdMaps {
        IdMaps {
            uid_map: self.uids.iter().map(line).collect(),
            gid_map: self.gids.iter().map(line).collect(),
        }
    }

    /// Returns the user id and the group id that the pod's root has on the node.
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
    fn ranges_map_the_pods_ids_to_the_nodes_ids() -> Result<()> {
        let options = UserNamespace {
            mode: NamespaceMode::Pod.into(),
            uids: vec![range(0, 65536, 65536)],
            gids: vec![range(5, 7, 1), range(0, 131_072, 5)],
        };
        let Some(mappings) = read(&options)? else {
            panic!("no mappings were returned although the options select a user namespace");
        };
        assert_eq!(mappings.root(), (65536, 131_072));
        assert_eq!(outside(&mappings.gids, 5), Some(7));
        assert_eq!(outside(&mappings.uids, 65536), None);
        assert_eq!(mappings.for_monitor().gid_map, "5 7 1\n0 131072 5\n");
        Ok(())
    }

    #[test]
    fn mappings_that_the_kernel_would_refuse_are_refused_and_the_error_names_the_field() {
        let wrong = [
            vec![],
            vec![range(1, 1000, 10)],
            vec![range(0, 1000, 0)],
            vec![range(0, u32::MAX, 2)],
            vec![range(0, u32::MAX, 1)],
            vec![range(0, u32::MAX - 1, 2)],
            vec![range(0, 0, u32::MAX), range(u32::MAX, u32::MAX, 1)],
            vec![range(0, 1000, 10), range(10, 1009, 10)],
            vec![range(0, 1000, 10), range(9, 2000, 10)],
        ];
        for ranges in wrong {
            let refused = check("uids", &ranges);
            assert!(
                refused.is_err_and(|error| error.sentence().contains("the uids")),
                "the invalid uid ranges {ranges:?} were accepted, or the error does not name uids"
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
