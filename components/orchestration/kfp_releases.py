"""What older releases of Kubeflow Pipelines do with our pipeline, read in their sources.

A server drops the settings of pods that it doesn't know, without an error (backend/src/common/util/json.go,
UnmarshalString, of all releases since 2.0).
"""

import re
import sys

from univigu.errors import ConfigError

# The first with node selectors, tolerations and claims as parameters (kubernetes_executor_config.proto).
OLDEST = (2, 5)
# A release, what earlier ones lack, and where that was read.
SINCE = {
    # backend/src/v2/compiler/argocompiler/spec_patch.go: COMPILED_PIPELINE_SPEC_PATCH
    (2, 15): "retries no failed task",
    # kubernetes_executor_config.proto: SecurityContext
    (2, 16): "starts steps without a user, which Pod Security restricted refuses",
}


def check_release(version: str, host: str) -> None:
    """Print what an older server lacks; raises `ConfigError` for one that would run steps on any node.

    Nothing is known of a version that is not a number, such as that of a build of one's own.
    """
    if not (match := re.match(r"v?(\d+)\.(\d+)", version)):
        return
    release = (int(match[1]), int(match[2]))
    about = f"The server at {host} has Kubeflow Pipelines {version}, which"
    if release < OLDEST:
        raise ConfigError(
            f"{about} would ignore the node pools and tolerations of the steps; upgrade it to 2.17 (docs/operate.md)."
        )
    if lacks := [what for since, what in SINCE.items() if release < since]:
        print(f"{about} {' and '.join(lacks)}; upgrade it to 2.17 (docs/operate.md).", file=sys.stderr)
