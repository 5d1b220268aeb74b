#!/usr/bin/env bash
# Healthy: the training in this container has written to its log within the last quarter of an hour. TensorBoard names
# the log after the host, so a run of another container in the same folder does not count.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

find logs -name "events.out.tfevents.*.$HOSTNAME.*" -mmin -15 | grep --quiet .
