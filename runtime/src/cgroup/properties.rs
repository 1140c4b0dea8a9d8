//! The conversion of `linux.resources` to properties of a systemd unit. Whenever systemd rewrites
//! the files of a cgroup, systemd preserves the limits that it received as properties. If systemd
//! has no property for a limit, rrun writes the limit only to the cgroup's files. See
//! systemd.resource-control(5).

use oci_spec::runtime::{LinuxResources, LinuxThrottleDevice};

use super::resources::{cpu_weight, io_weight, swap_max};
use super::{devices, systemd};
use crate::cgroup::dbus::{BusValue, Property};
use crate::error::{Error, Result, refuse};
use crate::sys::number_list::NumberSet;

/// The number that means "infinity" in a property's value.
const INFINITY: u64 = u64::MAX;
const DEFAULT_CPU_PERIOD: u64 = 100_000;

/// The first version of systemd that supports OOMPolicy for scopes.
const OOM_POLICY_VERSION: u32 = 253;

/// Returns the properties that systemd accepts only when it starts the scope.
pub(crate) fn only_at_start(resources: &LinuxResources) -> Result<Vec<Property>> {
    let unified = resources.unified().as_ref();
    let group = unified.and_then(|all| all.get("memory.oom.group"));
    // Without the property OOMPolicy, systemd would clear memory.oom.group when it rewrites the
    // files of the cgroup.
    if group.is_some_and(|value| value.trim() == "1") && systemd::version()? >= OOM_POLICY_VERSION {
        let policy = BusValue::Text("kill".to_owned());
        return Ok(vec![("OOMPolicy".to_owned(), policy)]);
    }
    Ok(Vec::new())
}

/// The first version of systemd that accepts a CPUWeight of zero. For a CPUWeight of zero, systemd
/// sets cpu.idle.
const IDLE_VERSION: u32 = 252;

/// Converts the limits in `resources` to properties of a systemd unit. Includes the device rules
/// only if `with_devices` is true.
///
/// # Errors
/// Fails if a value cannot be parsed. The error names the invalid field.
pub(crate) fn from_resources(
    resources: &LinuxResources,
    with_devices: bool,
) -> Result<Vec<Property>> {
    let mut all = Properties::default();
    all.memory(resources);
    all.cpu(resources)?;
    all.io(resources);
    if let Some(pids) = resources.pids() {
        all.number(
            "TasksMax",
            match pids.limit() {
                0 => 1,
                limit => u64::try_from(limit).unwrap_or(INFINITY),
            },
        );
    }
    for (key, value) in resources.unified().iter().flatten() {
        all.unified(key, value)?;
    }
    if with_devices {
        all.0.extend(devices::properties(
            resources.devices().as_deref().unwrap_or_default(),
        )?);
    }
    Ok(all.0)
}

#[derive(Default)]
struct Properties(Vec<Property>);

impl Properties {
    /// Sets a property. A later value of the property overrides an earlier value, like a later
    /// write to a cgroup file.
    fn set(&mut self, name: &str, value: BusValue) {
        self.0.retain(|(known, _)| known != name);
        self.0.push((name.to_owned(), value));
    }

    fn number(&mut self, name: &str, value: u64) {
        self.set(name, BusValue::U64(value));
    }

    fn memory(&mut self, resources: &LinuxResources) {
        let Some(memory) = resources.memory() else {
            return;
        };
        let limit = |value: i64| u64::try_from(value).unwrap_or(INFINITY);
        if let Some(value) = memory.limit().filter(|value| *value != 0) {
            self.number("MemoryMax", limit(value));
        }
        if let Some(value) = memory.reservation().filter(|value| *value != 0) {
            self.number("MemoryLow", limit(value));
        }
        if let Some(value) = swap_max(resources) {
            self.number("MemorySwapMax", value.parse().unwrap_or(INFINITY));
        }
    }

    fn cpu(&mut self, resources: &LinuxResources) -> Result<()> {
        let Some(cpu) = resources.cpu() else {
            return Ok(());
        };
        if let Some(shares) = cpu.shares().filter(|shares| *shares != 0) {
            self.number("CPUWeight", cpu_weight(shares));
        }
        if let Some(idle) = cpu.idle() {
            self.idle(idle == 1)?;
        }
        let quota = cpu.quota().unwrap_or(0);
        let period = cpu.period().unwrap_or(0);
        if quota != 0 || period != 0 {
            self.quota(u64::try_from(quota).ok().filter(|quota| *quota > 0), period);
        }
        for (name, list) in [
            ("AllowedCPUs", cpu.cpus()),
            ("AllowedMemoryNodes", cpu.mems()),
        ] {
            if let Some(list) = list.as_ref().filter(|list| !list.is_empty()) {
                let field = if name == "AllowedCPUs" {
                    "cpus"
                } else {
                    "mems"
                };
                self.bits(name, &format!("linux.resources.cpu.{field}"), list)?;
            }
        }
        Ok(())
    }

    /// Sets the CPU weight to zero if `idle` is true. For a CPU weight of zero, systemd sets
    /// cpu.idle. The kernel then runs the unit's processes only when the CPU is otherwise idle.
    fn idle(&mut self, idle: bool) -> Result<()> {
        if idle && systemd::version()? >= IDLE_VERSION {
            self.number("CPUWeight", 0);
        }
        Ok(())
    }

    /// Sets the CPU quota. systemd expects microseconds of CPU time per second, in steps of 10 000
    /// (one hundredth of a CPU). rrun rounds the quota up to the next step, and later writes the
    /// exact quota to cpu.max. So the exact quota never exceeds systemd's quota.
    fn quota(&mut self, quota: Option<u64>, period: u64) {
        let per_second = quota.map_or(INFINITY, |quota| {
            let period = if period == 0 {
                DEFAULT_CPU_PERIOD
            } else {
                period
            };
            let exact = quota.saturating_mul(1_000_000) / period;
            exact.checked_next_multiple_of(10_000).unwrap_or(INFINITY)
        });
        if period != 0 {
            self.number("CPUQuotaPeriodUSec", period);
        }
        self.number("CPUQuotaPerSecUSec", per_second);
    }

    fn bits(&mut self, name: &str, field: &str, list: &str) -> Result<()> {
        let Some(set) = NumberSet::parse(list).map_err(|error| error.while_doing(field))? else {
            refuse!("{field}: is empty");
        };
        self.set(name, BusValue::Bytes(set.bytes()));
        Ok(())
    }

    fn io(&mut self, resources: &LinuxResources) {
        let Some(io) = resources.block_io() else {
            return;
        };
        if let Some(weight) = io.weight().filter(|weight| *weight != 0) {
            self.number("IOWeight", io_weight(weight));
        }
        let mut throttle = |name: &str, devices: &Option<Vec<LinuxThrottleDevice>>| {
            let rates: Vec<(String, u64)> = devices
                .iter()
                .flatten()
                .map(|device| {
                    let path = format!("/dev/block/{}:{}", device.major(), device.minor());
                    // A rate of zero removes the limit.
                    (
                        path,
                        Some(device.rate())
                            .filter(|rate| *rate != 0)
                            .unwrap_or(INFINITY),
                    )
                })
                .collect();
            if !rates.is_empty() {
                self.set(name, BusValue::Rates(rates));
            }
        };
        throttle("IOReadBandwidthMax", io.throttle_read_bps_device());
        throttle("IOWriteBandwidthMax", io.throttle_write_bps_device());
        throttle("IOReadIOPSMax", io.throttle_read_iops_device());
        throttle("IOWriteIOPSMax", io.throttle_write_iops_device());
    }

    fn unified(&mut self, key: &str, value: &str) -> Result<()> {
        let value = value.trim();
        let wrong = || {
            Error::new(format!(
                "linux.resources.unified {key}: {value} is not a valid value for this file"
            ))
        };
        let number = |text: &str| match text {
            "max" => Ok(INFINITY),
            text => text.parse::<u64>().map_err(|_| wrong()),
        };
        let property = match key {
            "memory.max" => "MemoryMax",
            "memory.high" => "MemoryHigh",
            "memory.low" => "MemoryLow",
            "memory.min" => "MemoryMin",
            "memory.swap.max" => "MemorySwapMax",
            "pids.max" => "TasksMax",
            "cpu.weight" => "CPUWeight",
            "cpu.idle" => {
                self.idle(value == "1")?;
                return Ok(());
            }
            "cpu.max" => {
                let (quota, period) = value.split_once(' ').unwrap_or((value, "0"));
                let quota = Some(number(quota)?).filter(|quota| *quota != INFINITY);
                self.quota(quota, period.trim().parse().map_err(|_| wrong())?);
                return Ok(());
            }
            "cpuset.cpus" | "cpuset.mems" => {
                let name = match key {
                    "cpuset.cpus" => "AllowedCPUs",
                    _ => "AllowedMemoryNodes",
                };
                return self.bits(name, &format!("linux.resources.unified {key}"), value);
            }
            _ => return Ok(()),
        };
        let value = number(value)?;
        self.number(property, value);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn properties_of(json: &str) -> Vec<Property> {
        let mut all = from_resources(&serde_json::from_str(json).unwrap(), false).unwrap();
        all.sort_by(|(first, _), (second, _)| first.cmp(second));
        all
    }

    #[test]
    fn limits_become_properties_of_the_unit() {
        let number = |name: &str, value| (name.to_owned(), BusValue::U64(value));
        assert_eq!(
            properties_of(
                r#"{"memory":{"limit":200,"swap":300,"reservation":100},
                    "cpu":{"shares":1024,"quota":15500,"period":100000,"cpus":"0-2,9"},
                    "pids":{"limit":-1},"unified":{"memory.min":"7","memory.high":"max"}}"#
            ),
            [
                ("AllowedCPUs".to_owned(), BusValue::Bytes(vec![0b111, 0b10])),
                number("CPUQuotaPerSecUSec", 160_000),
                number("CPUQuotaPeriodUSec", 100_000),
                number("CPUWeight", 100),
                number("MemoryHigh", INFINITY),
                number("MemoryLow", 100),
                number("MemoryMax", 200),
                number("MemoryMin", 7),
                number("MemorySwapMax", 100),
                number("TasksMax", INFINITY),
            ]
        );
        assert_eq!(
            properties_of(r#"{"unified":{"cpu.max":"50000 100000","hugetlb.2MB.max":"0"}}"#),
            [
                number("CPUQuotaPerSecUSec", 500_000),
                number("CPUQuotaPeriodUSec", 100_000),
            ]
        );
        assert_eq!(
            properties_of(r#"{"cpu":{"quota":-1}}"#),
            [number("CPUQuotaPerSecUSec", INFINITY)]
        );
        assert!(properties_of(r#"{"cpu":{"cpus":"","shares":0},"memory":{"limit":0}}"#).is_empty());
    }

    #[test]
    fn the_error_for_an_invalid_value_names_the_field() {
        for (json, field) in [
            (r#"{"cpu":{"cpus":"3-1"}}"#, "linux.resources.cpu.cpus"),
            (r#"{"cpu":{"mems":"x"}}"#, "linux.resources.cpu.mems"),
            (r#"{"unified":{"memory.max":"much"}}"#, "memory.max"),
        ] {
            let resources = serde_json::from_str(json).unwrap();
            let error = from_resources(&resources, false).unwrap_err();
            assert!(error.to_string().contains(field), "{error}");
        }
    }
}
