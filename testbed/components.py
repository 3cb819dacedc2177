"""The command line and configuration of every component: what runs, and why it is set so."""

import json
import os
from pathlib import Path

from testbed import host, pki
from testbed.binaries import binary
from testbed.instance import NODE_RUN, Instance, State, containerd_root, write_atomically

CONTAINERD_SOCKET = NODE_RUN / "containerd.sock"
S3_ACCESS_KEY = "testbed"
S3_SECRET_KEY = "testbed-secret-key"  # known to every test; the server listens on loopback and the pod bridge only
S3_REGION = "us-east-1"
CLUSTER_DOMAIN = "cluster.local"

PORTS = ["etcd", "etcd-peer", "apiserver", "s3"]
"""Ports on loopback, or on the bridge address when there is a node; chosen at each start."""


def api_server_url(state: State) -> str:
    return f"https://{state.host_ip}:{state.ports['apiserver']}"


def control_plane(instance: Instance, state: State) -> dict[str, list[str]]:
    """argv by component, in the order of starting."""
    d, ports = instance.dir, state.ports
    etcd = f"http://127.0.0.1:{ports['etcd']}"
    s3_addresses = [f"127.0.0.1:{ports['s3']}"] + ([f"{state.host_ip}:{ports['s3']}"] if state.node else [])
    s3_ports = [argument for address in s3_addresses for argument in ("--port", address)]
    return {
        "etcd": [
            binary("etcd"),
            *_flags(
                name="testbed",
                data_dir=d / "etcd",
                listen_client_urls=etcd,
                advertise_client_urls=etcd,
                listen_peer_urls=f"http://127.0.0.1:{ports['etcd-peer']}",
                initial_advertise_peer_urls=f"http://127.0.0.1:{ports['etcd-peer']}",
                initial_cluster=f"testbed=http://127.0.0.1:{ports['etcd-peer']}",
                unsafe_no_fsync="true",  # a new cluster at each `up`: nothing here outlives a power cut
                log_level="warn",
            ),
        ],
        "s3": [
            binary("versitygw"),
            *("--access", S3_ACCESS_KEY, "--secret", S3_SECRET_KEY, "--region", S3_REGION, *s3_ports),
            *("--iam-dir", str(d / "s3-accounts")),  # more accounts than root, so that tests can be denied something
            *("posix", str(d / "s3")),
        ],
        "kube-apiserver": [
            binary("kube-apiserver"),
            *_flags(
                etcd_servers=etcd,
                bind_address=state.host_ip,
                advertise_address=state.host_ip,
                secure_port=ports["apiserver"],
                service_cluster_ip_range=host.SERVICE_NETWORK,
                cert_dir=d / "pki",
                tls_cert_file=d / "pki/apiserver.crt",
                tls_private_key_file=d / "pki/apiserver.key",
                token_auth_file=d / "pki/tokens.csv",
                authorization_mode="Node,RBAC",
                enable_admission_plugins="NodeRestriction",
                allow_privileged="true",
                service_account_issuer="https://kubernetes.default.svc",
                service_account_key_file=d / "pki/sa.pub",
                service_account_signing_key_file=d / "pki/sa.key",
                kubelet_client_certificate=d / "pki/kubelet-client.crt",
                kubelet_client_key=d / "pki/kubelet-client.key",
                kubelet_preferred_address_types="InternalIP",
                # A loopback address may not be an Endpoint; without a node nobody would use that Service anyway.
                endpoint_reconciler_type="lease" if state.node else "none",
            ),
        ],
        "kube-controller-manager": [
            binary("kube-controller-manager"),
            *_flags(
                kubeconfig=d / "kube-controller-manager.kubeconfig",
                service_account_private_key_file=d / "pki/sa.key",
                root_ca_file=d / "pki/ca.crt",
                use_service_account_credentials="true",
                leader_elect="false",
                secure_port=0,
                flex_volume_plugin_dir=d / "volume-plugins",
                # Nodes die here within seconds, not minutes, so that a test of a lost node need not wait five.
                node_monitor_grace_period="16s",
            ),
        ],
        "kube-scheduler": [
            binary("kube-scheduler"),
            *_flags(kubeconfig=d / "kube-scheduler.kubeconfig", leader_elect="false", secure_port=0),
        ],
    }


def node(instance: Instance, state: State) -> dict[str, list[str]]:
    """containerd runs first; the others need the API server. Also writes their configuration."""
    d = instance.dir
    write_atomically(d / "containerd.toml", _containerd_config(d))
    write_atomically(d / "cni/10-bridge.conflist", json.dumps(_cni_config()))
    write_atomically(d / "kubelet.json", json.dumps(_kubelet_config(d), indent=1))
    write_atomically(d / "kube-proxy.json", json.dumps(_proxy_config(d), indent=1))
    write_atomically(d / "Corefile", _corefile(d))
    return {
        "containerd": [binary("containerd"), "--config", str(d / "containerd.toml")],
        "kubelet": [
            binary("kubelet"),
            *_flags(
                config=d / "kubelet.json",
                kubeconfig=d / "kubelet.kubeconfig",
                root_dir=d / "kubelet",
                cert_dir=d / "kubelet/pki",
                hostname_override=pki.NODE_NAME,
                node_ip=state.host_ip,
            ),
        ],
        "kube-proxy": [binary("kube-proxy"), *_flags(config=d / "kube-proxy.json")],
        "coredns": [binary("coredns"), "-conf", str(d / "Corefile")],
    }


def _flags(**values: object) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]


def _kubelet_config(d: Path) -> dict[str, object]:
    disk = os.statvfs(d)
    # Evict when 2 GB are left (or 2 % of a small disk): the kubelet's 10 % would evict everything on a well-filled
    # laptop.
    floor_bytes = min(2 << 30, disk.f_blocks * disk.f_frsize // 50)
    config: dict[str, object] = {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": host.NODE_IP,
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": str(d / "pki/ca.crt")},
        },
        "authorization": {"mode": "Webhook"},
        "containerRuntimeEndpoint": f"unix://{CONTAINERD_SOCKET}",
        "cgroupDriver": "cgroupfs",
        # Everything of ours below one cgroup, so that `down` finds it all; no limits on the machine's other processes.
        "cgroupRoot": f"/{host.CGROUP}",
        "enforceNodeAllocatable": [],
        "failSwapOn": False,
        "clusterDomain": CLUSTER_DOMAIN,
        "clusterDNS": [host.NODE_IP],
        "resolvConf": "",
        "healthzPort": 0,
        "readOnlyPort": 0,
        "oomScoreAdj": 0,
        "makeIPTablesUtilChains": False,
        "podLogsDir": str(d / "pod-logs"),
        "volumePluginDir": str(d / "volume-plugins"),
        "evictionHard": {
            "memory.available": "200Mi",
            "nodefs.available": str(floor_bytes),
            "imagefs.available": str(floor_bytes),
        },
        "imageGCHighThresholdPercent": 100,  # loaded images are a cache of ours, never garbage
        "nodeStatusUpdateFrequency": "4s",
        "serializeImagePulls": False,
        # A container that a test killed for the third time is back in a second, not in forty.
        "crashLoopBackOff": {"maxContainerRestartPeriod": "1s"},
        "registerWithTaints": [],
    }
    if host.cgroup_v1():
        config["failCgroupV1"] = False
    return config


def _proxy_config(d: Path) -> dict[str, object]:
    return {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "clientConnection": {"kubeconfig": str(d / "kube-proxy.kubeconfig")},
        "hostnameOverride": pki.NODE_NAME,
        "mode": "nftables",  # one table of its own: easy to take away again, and no iptables needed
        # Replies must come back through the host to be translated; with bridged pods that is sure only when the host is
        # the sender (br_netfilter may be missing).
        "nftables": {"masqueradeAll": True},
        "clusterCIDR": str(host.POD_NETWORK),
        "nodePortAddresses": [f"{host.NODE_IP}/32"],
        "healthzBindAddress": "",
        "metricsBindAddress": "",
        "conntrack": {"maxPerCore": 0, "min": 0},
        "oomScoreAdj": 0,
    }


def _cni_config() -> dict[str, object]:
    # The bridge exists already and has its address. `isGateway` stays off, as it would switch on forwarding
    # machine-wide.
    ipam = {
        "type": "host-local",
        "ranges": [
            [{"subnet": str(host.POD_NETWORK), "rangeStart": str(host.POD_NETWORK[10]), "gateway": host.NODE_IP}]
        ],
        "routes": [{"dst": "0.0.0.0/0", "gw": host.NODE_IP}],
        "dataDir": str(NODE_RUN / "ipam"),
    }
    bridge = {
        "type": "bridge",
        "bridge": host.BRIDGE,
        "isGateway": False,
        "ipMasq": False,
        "hairpinMode": True,
        "ipam": ipam,
    }
    return {"cniVersion": "1.0.0", "name": host.NETWORK, "plugins": [bridge]}


def _corefile(d: Path) -> str:
    # Names outside the cluster do not exist: an answer at once, where forwarding would make tests depend on the
    # network. In a block of its own, as CoreDNS would otherwise ask `template` before `kubernetes`.
    zones = " ".join(f"{zone}:53" for zone in (CLUSTER_DOMAIN, "in-addr.arpa", "ip6.arpa"))
    return f"""\
{zones} {{
    bind {host.NODE_IP}
    errors
    kubernetes {CLUSTER_DOMAIN} in-addr.arpa ip6.arpa {{
        kubeconfig {d / "coredns.kubeconfig"}
        pods insecure
        ttl 1
    }}
}}
.:53 {{
    bind {host.NODE_IP}
    errors
    template ANY ANY . {{
        rcode NXDOMAIN
    }}
}}
"""


def _containerd_config(d: Path) -> str:
    runtime = "plugins.'io.containerd.cri.v1.runtime'"
    return f"""\
version = 3
root = '{containerd_root()}'
state = '{NODE_RUN}/containerd'
disabled_plugins = [
  'io.containerd.snapshotter.v1.blockfile', 'io.containerd.snapshotter.v1.btrfs',
  'io.containerd.snapshotter.v1.devmapper',
  'io.containerd.snapshotter.v1.erofs', 'io.containerd.snapshotter.v1.zfs', 'io.containerd.nri.v1.nri',
]

[grpc]
address = '{CONTAINERD_SOCKET}'

[ttrpc]
address = '{CONTAINERD_SOCKET}.ttrpc'

[plugins.'io.containerd.internal.v1.opt']
path = '{NODE_RUN}/opt'

[plugins.'io.containerd.cri.v1.images'.pinned_images]
sandbox = 'localhost/pause:1'

[{runtime}]
# Where the host forbids lowering oom_score_adj (a container without CAP_SYS_RESOURCE), runc would die with
# "can't get final child's PID from pipe: EOF".
restrict_oom_score_adj = true
netns_mounts_under_state_dir = true

[{runtime}.cni]
bin_dirs = ['/usr/lib/cni', '/opt/cni/bin']
use_internal_loopback = true
conf_dir = '{d}/cni'

[{runtime}.containerd.runtimes.runc]
runtime_type = 'io.containerd.runc.v2'

[{runtime}.containerd.runtimes.runc.options]
BinaryName = 'runc'
Root = '{NODE_RUN}/runc'
SystemdCgroup = false
"""
