"""Certificates, tokens and kubeconfigs of one instance: one CA, three certificates, one bearer token for each
component.

Tokens in a static file keep this small; certificates come from the `openssl` command, as Python's standard library
makes none. Every component is its own user with its real RBAC role, so a missing permission shows here as it would in a
real cluster.
"""

import json
import secrets
from pathlib import Path

from testbed.instance import write_atomically
from testbed.processes import run

NODE_NAME = "testbed-node"
USERS = {
    "admin": ("admin", "system:masters"),
    "kube-controller-manager": ("system:kube-controller-manager", ""),
    "kube-scheduler": ("system:kube-scheduler", ""),
    "kubelet": (f"system:node:{NODE_NAME}", "system:nodes"),
    "kube-proxy": ("system:kube-proxy", ""),
    "coredns": ("system:coredns", ""),
}


def make(directory: Path, server_ips: list[str], server_url: str) -> None:
    """Write `pki/` (CA, certificates, service-account key, tokens.csv) and `<user>.kubeconfig` for each user."""
    pki = directory / "pki"
    pki.mkdir(mode=0o700, parents=True, exist_ok=True)
    _openssl(
        "req",
        "-x509",
        *_new_key(pki / "ca.key"),
        "-subj",
        "/CN=finetune-testbed",
        "-days",
        "30",
        "-out",
        str(pki / "ca.crt"),
    )
    names = [
        "kubernetes",
        "kubernetes.default",
        "kubernetes.default.svc",
        "kubernetes.default.svc.cluster.local",
        "localhost",
    ]
    alternative = ",".join([f"DNS:{name}" for name in names] + [f"IP:{ip}" for ip in server_ips])
    _sign(pki, "apiserver", "/CN=kube-apiserver", f"extendedKeyUsage=serverAuth\nsubjectAltName={alternative}\n")
    _sign(pki, "kubelet-client", "/O=system:masters/CN=kube-apiserver-kubelet-client", "extendedKeyUsage=clientAuth\n")
    _openssl("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", str(pki / "sa.key"))
    _openssl("pkey", "-in", str(pki / "sa.key"), "-pubout", "-out", str(pki / "sa.pub"))
    rows: list[str] = []
    for user, (name, group) in USERS.items():
        token = secrets.token_hex(24)
        rows.append(f'{token},{name},{user},"{group}"')
        write_atomically(directory / f"{user}.kubeconfig", _kubeconfig(server_url, pki / "ca.crt", token))
    write_atomically(pki / "tokens.csv", "\n".join(rows) + "\n")


def token(directory: Path, user: str) -> str:
    """The bearer token in a kubeconfig written above (JSON is YAML, so no YAML library is needed)."""
    return json.loads((directory / f"{user}.kubeconfig").read_text())["users"][0]["user"]["token"]


def _openssl(*arguments: str) -> None:
    run(["openssl", *arguments], timeout_s=30)


def _new_key(path: Path) -> list[str]:
    return ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", str(path)]


def _sign(pki: Path, name: str, subject: str, extensions: str) -> None:
    request, extension_file = pki / f"{name}.csr", pki / f"{name}.ext"
    # Python 3.13 checks certificates strictly (RFC 5280) and wants the key identifiers.
    extension_file.write_text(f"authorityKeyIdentifier=keyid\nsubjectKeyIdentifier=hash\n{extensions}")
    _openssl("req", "-new", *_new_key(pki / f"{name}.key"), "-subj", subject, "-out", str(request))
    signing = ["-CA", str(pki / "ca.crt"), "-CAkey", str(pki / "ca.key"), "-CAcreateserial", "-days", "30"]
    _openssl(
        "x509", "-req", "-in", str(request), *signing, "-extfile", str(extension_file), "-out", str(pki / f"{name}.crt")
    )


def _kubeconfig(server_url: str, ca_file: Path, bearer: str) -> str:
    name = "finetune-testbed"
    return json.dumps(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": name, "cluster": {"server": server_url, "certificate-authority": str(ca_file)}}],
            "users": [{"name": name, "user": {"token": bearer}}],
            "contexts": [{"name": name, "context": {"cluster": name, "user": name}}],
            "current-context": name,
        },
        indent=1,
    )
