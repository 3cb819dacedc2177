"""The only module of the CLI that talks to Kubernetes."""

from typing import Any, cast

from kubernetes import client, config
from kubernetes.client.exceptions import ApiException
from kubernetes.config.config_exception import ConfigException
from urllib3.exceptions import HTTPError
from yaml import YAMLError

from finetune_api.names import GROUP, PLURAL, VERSION
from finetune_api.redact import shortened
from finetune_cli.errors import CommandError, Exit

_REQUEST_TIMEOUT_S = 10


class UnavailableError(Exception):
    """The API server does not answer now; asking again may help."""


class Cluster:
    """The cluster that kubectl would talk to."""

    def __init__(self, context: str | None) -> None:
        """Raises CommandError when there is no usable kubeconfig."""
        try:
            self._api = client.CustomObjectsApi(config.new_client_from_config(context=context))
            _contexts, active = config.list_kube_config_contexts()
        except (ConfigException, OSError) as error:
            raise CommandError(f"no cluster: {shortened(str(error), 300)}; set KUBECONFIG", Exit.CLUSTER) from error
        except YAMLError as error:  # its words could quote a token
            raise CommandError("no cluster: the kubeconfig is no YAML; set KUBECONFIG", Exit.CLUSTER) from error
        inner = cast(dict[str, Any], active.get("context", {})) if isinstance(active, dict) else {}
        self.namespace = str(inner.get("namespace") or "default")

    def get(self, namespace: str, name: str) -> dict[str, Any]:
        """The FineTuneJob. Raises CommandError if it is not there or may not be read, UnavailableError."""
        try:
            found: Any = self._api.get_namespaced_custom_object(
                GROUP, VERSION, namespace, PLURAL, name, _request_timeout=_REQUEST_TIMEOUT_S
            )
        except ApiException as error:
            if error.status == 404:
                raise CommandError(f"there is no FineTuneJob {name} in namespace {namespace}", Exit.CLUSTER) from None
            if error.status in (401, 403):
                raise CommandError(f"the cluster does not let you read FineTuneJob {name}", Exit.CLUSTER) from None
            raise UnavailableError(f"the API server answered {error.status} {error.reason}") from error
        except (HTTPError, OSError) as error:
            raise UnavailableError(f"the API server does not answer ({type(error).__name__})") from error
        return found
