"""What mend is called in a cluster: its API group, labels, annotations, and the names in pods and Secrets."""

from __future__ import annotations

from typing import Final

GROUP: Final = "mend.dev"
VERSION: Final = "v1alpha1"
API_VERSION: Final = f"{GROUP}/{VERSION}"
KIND: Final = "TrainingRun"
PLURAL: Final = "trainingruns"
CONTROLLER_NAME: Final = "mend.dev/controller"

LABEL_RUN: Final = "mend.dev/run"
LABEL_WORKER: Final = "mend.dev/worker"
LABEL_ATTEMPT: Final = "mend.dev/attempt"
ANNOTATION_SAVE_NOW: Final = "mend.dev/save-now"  # of a run: each new value is a wish for a save
ANNOTATION_AVOIDS: Final = "mend.dev/avoids"  # of a pod: the nodes that mend keeps it off, with commas between
LABEL_MANAGED_BY: Final = "app.kubernetes.io/managed-by"

TRAINER_CONTAINER: Final = "trainer"
AGENT_PORT_NAME: Final = "mend-agent"
AGENT_COMMAND: Final = "mend-agent"
TOKEN_SECRET_KEY: Final = "token"
AUTHORITY_SECRET_KEY: Final = "ca.crt"  # in the Secret with the store's credentials; may be absent
TLS_SECRET_KEY: Final = "tls.pem"
SIGNING_SECRET_KEY: Final = "signing.key"
