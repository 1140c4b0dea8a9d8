//! Decides to which addresses a registry may send the server's requests.
//!
//! A registry can redirect a request to any address, and can name any address as its token server.
//! A pod can name any registry. Services on the node and metadata services of clouds answer
//! requests of every process on the node, so a pod could use rrun-cri to send requests to them. A
//! registry may therefore lead only to addresses of other hosts. A registry that itself has a
//! loopback or link-local address may lead to such addresses, too.
//!
//! The address is checked after the name was resolved, because the owner of a name can let it
//! resolve to any address.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex};

use reqwest::Url;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};

use rrun_calls::lock::lock;

/// Addresses of metadata services that are not link-local: Alibaba Cloud, Azure, Oracle Cloud, AWS
/// and Google Cloud.
const METADATA_V4: [Ipv4Addr; 3] = [
    Ipv4Addr::new(100, 100, 100, 200),
    Ipv4Addr::new(168, 63, 129, 16),
    Ipv4Addr::new(192, 0, 0, 192),
];
const METADATA_V6: [Ipv6Addr; 3] = [
    Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254),
    Ipv6Addr::new(0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254),
    Ipv6Addr::new(0xfd00, 0xc1, 0, 0, 0, 0, 0xa9fe, 0xa9fe),
];

/// The environment variables that name a proxy.
const PROXY_VARIABLES: [&str; 6] = [
    "HTTP_PROXY",
    "http_proxy",
    "HTTPS_PROXY",
    "https_proxy",
    "ALL_PROXY",
    "all_proxy",
];

/// The part of the network to which an address belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scope {
    /// The addresses of other hosts, including private networks.
    Others,
    /// The loopback addresses of this node, and the unspecified addresses, which also lead to it.
    Node,
    /// The link-local addresses, and the addresses of metadata services.
    Link,
}

impl Scope {
    pub(crate) fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(address) => Self::of_v4(address),
            IpAddr::V6(address) => match embedded(address) {
                Some(embedded) => Self::of_v4(embedded),
                None if address.is_loopback() || address.is_unspecified() => Scope::Node,
                None if address.is_unicast_link_local() || METADATA_V6.contains(&address) => {
                    Scope::Link
                }
                None => Scope::Others,
            },
        }
    }

    fn of_v4(address: Ipv4Addr) -> Self {
        // The kernel connects to the loopback interface if the address is 0.0.0.0.
        if address.is_loopback() || address.octets()[0] == 0 {
            Scope::Node
        } else if address.is_link_local() || METADATA_V4.contains(&address) {
            Scope::Link
        } else {
            Scope::Others
        }
    }

    /// Returns the scope of a URL's host, or `None` if only the resolver knows the host's address.
    fn of_url(url: &Url) -> Option<Self> {
        // `Url` has already converted unusual forms of IPv4 addresses, such as 0x7f.1.
        let host = url.host_str()?;
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        if let Ok(address) = bare.parse::<IpAddr>() {
            return Some(Scope::of(address));
        }
        let name = host.trim_end_matches('.');
        (name == "localhost" || name.ends_with(".localhost")).then_some(Scope::Node)
    }

    fn description(self) -> &'static str {
        match self {
            Scope::Others => "an address of another host",
            Scope::Node => "an address of this node itself",
            Scope::Link => "a link-local address or the address of a metadata service",
        }
    }
}

/// Returns the IPv4 address in an IPv6 address. The kernel or a gateway sends packets for such an
/// IPv6 address to the IPv4 address: IPv4-mapped, IPv4-compatible and IPv4-translated addresses
/// (RFC 4291, RFC 2765), NAT64 (RFC 6052, RFC 8215) and 6to4 (RFC 3056).
fn embedded(address: Ipv6Addr) -> Option<Ipv4Addr> {
    let segments = address.segments();
    let at = |high: u16, low: u16| {
        let ([a, b], [c, d]) = (high.to_be_bytes(), low.to_be_bytes());
        Ipv4Addr::new(a, b, c, d)
    };
    match segments {
        // `::` and `::1` are IPv6 addresses.
        [0, 0, 0, 0, 0, 0, 0, 0 | 1] => None,
        [0, 0, 0, 0, 0, 0 | 0xffff, high, low]
        | [0, 0, 0, 0, 0xffff, 0, high, low]
        | [0x64, 0xff9b, 0, 0, 0, 0, high, low]
        | [0x64, 0xff9b, 1, _, _, _, high, low] => Some(at(high, low)),
        [0x2002, high, low, ..] => Some(at(high, low)),
        _ => None,
    }
}

/// The scopes to which one registry may lead.
pub(crate) struct Reach {
    /// The setting `image.local_redirects`.
    everything: bool,
    /// The scopes in which the registry itself has answered.
    own: Mutex<Vec<Scope>>,
    /// The hosts of the node's HTTP proxies. The server connects to them on behalf of the
    /// operator.
    proxies: Vec<String>,
}

impl Reach {
    pub(crate) fn new(registry: &str, everything: bool) -> Self {
        let own = Url::parse(registry).ok().as_ref().and_then(Scope::of_url);
        let proxies = PROXY_VARIABLES.iter().filter_map(std::env::var_os);
        Reach {
            everything,
            own: Mutex::new(own.into_iter().collect()),
            proxies: proxies
                .filter_map(|proxy| proxy_host(&proxy.to_string_lossy()))
                .collect(),
        }
    }

    /// Returns the network from which an answer came: the IPv4 address, or the 64-bit prefix of the
    /// IPv6 address, because one machine can use all addresses of such a prefix. Returns `None` if
    /// the address is not known. If the server uses a proxy, the address can be the proxy's address.
    pub(crate) fn network(&self, address: Option<SocketAddr>) -> Option<String> {
        let address = address.filter(|_| self.proxies.is_empty())?;
        Some(match address.ip().to_canonical() {
            IpAddr::V4(address) => address.to_string(),
            IpAddr::V6(address) => {
                let [a, b, c, d, ..] = address.segments();
                format!("{}/64", Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0))
            }
        })
    }

    /// Records the address from which the registry itself has answered a request.
    pub(crate) fn learn(&self, address: Option<SocketAddr>) {
        // If the server uses a proxy, the address can be the proxy's address.
        if let Some(address) = address
            && self.proxies.is_empty()
        {
            let scope = Scope::of(address.ip());
            let mut own = lock(&self.own);
            if !own.contains(&scope) {
                own.push(scope);
            }
        }
    }

    fn permits(&self, scope: Scope) -> bool {
        self.everything || scope == Scope::Others || lock(&self.own).contains(&scope)
    }

    /// Checks an address in a URL. Returns the reason if the registry may not lead to this address.
    /// The address of a name is checked when the name is resolved.
    pub(crate) fn check(&self, url: &Url) -> Result<(), String> {
        match Scope::of_url(url) {
            Some(scope) if !self.permits(scope) => Err(refusal(scope)),
            _ => Ok(()),
        }
    }
}

fn refusal(scope: Scope) -> String {
    let what = scope.description();
    format!("which is {what}, and image.local_redirects is not set")
}

/// Returns the host in the value of a proxy variable. The value can lack the scheme.
fn proxy_host(value: &str) -> Option<String> {
    let url = if value.contains("://") {
        Url::parse(value)
    } else {
        Url::parse(&format!("http://{value}"))
    };
    url.ok()?.host_str().map(str::to_owned)
}

/// The resolver for hosts to which a registry leads. It returns only addresses that the registry
/// may lead to.
pub(crate) struct GuardedResolver(pub Arc<Reach>);

impl Resolve for GuardedResolver {
    fn resolve(&self, name: Name) -> Resolving {
        let reach = Arc::clone(&self.0);
        Box::pin(async move {
            let found = tokio::net::lookup_host((name.as_str(), 0)).await?;
            if reach.proxies.iter().any(|proxy| proxy == name.as_str()) {
                let found: Addrs = Box::new(found.collect::<Vec<_>>().into_iter());
                return Ok(found);
            }
            let mut refused = None;
            let mut permitted = Vec::new();
            for address in found {
                match Scope::of(address.ip()) {
                    scope if reach.permits(scope) => permitted.push(address),
                    scope => refused = Some((address.ip(), scope)),
                }
            }
            match refused {
                Some((address, scope)) if permitted.is_empty() => {
                    let why = refusal(scope);
                    Err(format!("the host's name resolves to {address}, {why}").into())
                }
                _ => Ok(Box::new(permitted.into_iter()) as Addrs),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scope(url: &str) -> Option<Scope> {
        Scope::of_url(&Url::parse(url).ok()?)
    }

    #[test]
    fn each_form_of_an_address_has_the_scope_of_the_address() {
        for host in [
            "127.0.0.1",
            "127.255.0.9",
            "2130706433",
            "0x7f.1",
            "0177.0.0.1",
            "127.1",
            "127.0.0.1.",
            "0.0.0.0",
            "0",
            "[::1]",
            "[::]",
            "[::ffff:127.0.0.1]",
            "[::ffff:7f00:1]",
            "[::127.0.0.1]",
            "[::ffff:0:127.0.0.1]",
            "[64:ff9b::127.0.0.1]",
            "[64:ff9b:1::7f00:1]",
            "[2002:7f00:1::]",
            "localhost",
            "LOCALHOST.",
            "a.localhost",
        ] {
            assert_eq!(
                scope(&format!("http://{host}:80/")),
                Some(Scope::Node),
                "{host}"
            );
        }
        for host in [
            "169.254.169.254",
            "2852039166",
            "[fe80::1]",
            "[::ffff:169.254.169.254]",
            "[64:ff9b::a9fe:a9fe]",
            "100.100.100.200",
            "168.63.129.16",
            "[fd00:ec2::254]",
        ] {
            assert_eq!(
                scope(&format!("http://{host}/")),
                Some(Scope::Link),
                "{host}"
            );
        }
        for host in [
            "10.0.0.1",
            "192.168.1.1",
            "172.16.0.1",
            "1.1.1.1",
            "[fd00::1]",
            "[2001:db8::1]",
        ] {
            assert_eq!(
                scope(&format!("https://{host}/")),
                Some(Scope::Others),
                "{host}"
            );
        }
        assert_eq!(scope("https://registry.example/"), None);
        assert_eq!(scope("https://localhost.example/"), None);
    }

    #[test]
    fn a_registry_leads_to_its_own_scope_and_to_other_hosts() {
        let allowed = |registry: &str, everything, to: &str| {
            let reach = Reach::new(registry, everything);
            Url::parse(to).is_ok_and(|url| reach.check(&url).is_ok())
        };
        for (registry, to, is) in [
            ("https://r.example/v2", "http://127.0.0.1:5003/", false),
            ("https://10.0.0.1:5000/v2", "http://[::1]/", false),
            (
                "https://r.example/v2",
                "http://169.254.169.254/latest",
                false,
            ),
            ("https://r.example/v2", "https://10.0.0.9/", true),
            ("https://r.example/v2", "https://cdn.example/", true),
            ("http://127.0.0.1:5000/v2", "http://localhost:5001/", true),
            ("http://127.0.0.1:5000/v2", "http://169.254.169.254/", false),
            ("http://169.254.1.1/v2", "http://169.254.1.2/", true),
            ("http://169.254.1.1/v2", "http://127.0.0.1/", false),
        ] {
            assert_eq!(allowed(registry, false, to), is, "from {registry} to {to}");
            assert!(allowed(registry, true, to), "from {registry} to {to}");
        }
    }

    #[test]
    fn a_registry_whose_name_resolves_to_the_node_leads_to_the_node() {
        let reach = Reach {
            everything: false,
            own: Mutex::default(),
            proxies: Vec::new(),
        };
        assert!(!reach.permits(Scope::Node));
        reach.learn(Some(SocketAddr::from(([127, 0, 0, 1], 443))));
        assert!(reach.permits(Scope::Node) && !reach.permits(Scope::Link));
        // A proxy can also have an address of the node.
        let reach = Reach {
            everything: false,
            own: Mutex::default(),
            proxies: vec!["proxy".to_owned()],
        };
        reach.learn(Some(SocketAddr::from(([127, 0, 0, 1], 443))));
        assert!(!reach.permits(Scope::Node));
    }

    #[tokio::test]
    async fn a_name_is_refused_if_it_resolves_to_an_address_of_the_node()
    -> Result<(), Box<dyn std::error::Error>> {
        // No name server is needed to resolve this name.
        let name = "localhost";
        let resolve = |everything, proxies: &[&str]| {
            let resolver = GuardedResolver(Arc::new(Reach {
                everything,
                own: Mutex::default(),
                proxies: proxies.iter().map(|proxy| (*proxy).to_owned()).collect(),
            }));
            let name: Result<Name, _> = name.parse();
            async move {
                let found = resolver.resolve(name.map_err(|_| "parse the name")?).await;
                found
                    .map(Iterator::count)
                    .map_err(|error| error.to_string())
            }
        };
        let error = resolve(false, &[]).await;
        assert!(
            error
                .as_ref()
                .is_err_and(|e| e.contains("image.local_redirects")),
            "{error:?}"
        );
        assert!(resolve(true, &[]).await? > 0);
        assert!(resolve(false, &[name]).await? > 0);
        Ok(())
    }

    #[test]
    fn the_host_of_a_proxy_is_found_without_a_scheme() {
        for value in [
            "http://user:word@proxy:3128/",
            "proxy:3128",
            "socks5://proxy",
            "proxy",
        ] {
            assert_eq!(proxy_host(value).as_deref(), Some("proxy"), "{value}");
        }
    }

    #[test]
    fn all_ports_of_an_address_and_all_addresses_of_a_prefix_are_one_network()
    -> Result<(), Box<dyn std::error::Error>> {
        let network = |address: &str, proxies: Vec<String>| {
            let reach = Reach {
                everything: false,
                own: Mutex::default(),
                proxies,
            };
            let address: SocketAddr = address.parse()?;
            Ok::<_, Box<dyn std::error::Error>>(reach.network(Some(address)))
        };
        for (address, expected) in [
            ("192.0.2.1:80", "192.0.2.1"),
            ("192.0.2.1:5000", "192.0.2.1"),
            ("[::ffff:192.0.2.1]:80", "192.0.2.1"),
            ("[2001:db8:1:2:3::4]:80", "2001:db8:1:2::/64"),
            ("[2001:db8:1:2:5::6]:90", "2001:db8:1:2::/64"),
        ] {
            assert_eq!(network(address, Vec::new())?.as_deref(), Some(expected));
        }
        let proxied = network("192.0.2.1:80", vec!["proxy".to_owned()])?;
        assert_eq!(proxied, None, "the address of a proxy is not the host's");
        Ok(())
    }
}
