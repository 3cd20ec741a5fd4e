#!/usr/bin/env bash
# Prometheus, and Grafana where it is installed, on loopback, for every Ray cluster that starts on this machine. Ctrl-C ends both.
#
#     dashboards/start.sh        # then, in another terminal: make demo
#
# PROMETHEUS_PORT (9090), GRAFANA_PORT (3000): where they listen.
# DASHBOARDS_DATA (~/.cache/nsdray-dashboards): where they keep what they have seen.
# RAY_TMPDIR (/tmp): as for Ray; the folder above its session folders.
set -euo pipefail
here=$(cd "${BASH_SOURCE[0]%/*}" && pwd)
data=${DASHBOARDS_DATA:-$HOME/.cache/nsdray-dashboards}
export PROMETHEUS_PORT=${PROMETHEUS_PORT:-9090} GRAFANA_PORT=${GRAFANA_PORT:-3000} NSDRAY_DASHBOARDS=$here/grafana/dashboards

if ! command -v prometheus >/dev/null; then
    echo "error: there is no prometheus here. On Debian and Ubuntu: sudo apt-get install --no-install-recommends prometheus" \
        "(and sudo systemctl disable --now prometheus: its own service listens on every interface)." \
        "Elsewhere: a release from prometheus.io/download, put on the PATH." >&2
    exit 1
fi

mkdir -p "$data/prometheus" "$data/grafana"
ray=${RAY_TMPDIR:-/tmp}/ray
[ -d "$ray" ] || mkdir -p -m 777 "$ray"  # as Ray makes it, for every user of the machine
sed "s|/tmp/ray/|$ray/|" "$here/prometheus.yml" >"$data/prometheus.yml"
running=()
stop() {
    trap - EXIT INT TERM
    kill "${running[@]}" 2>/dev/null || true
    wait || true
}
trap stop EXIT
trap 'exit 0' INT TERM

prometheus --config.file="$data/prometheus.yml" --storage.tsdb.path="$data/prometheus" --log.level=warn \
    --web.listen-address="127.0.0.1:$PROMETHEUS_PORT" &
running+=($!)
echo "Prometheus: http://127.0.0.1:$PROMETHEUS_PORT"

if command -v grafana-server >/dev/null; then
    home=${GRAFANA_HOME:-/usr/share/grafana}  # where Debian's and RPM's packages of Grafana put it
    GF_SERVER_HTTP_ADDR=127.0.0.1 GF_SERVER_HTTP_PORT=$GRAFANA_PORT GF_PATHS_DATA=$data/grafana GF_PATHS_LOGS=$data/grafana \
        GF_PATHS_PROVISIONING=$here/grafana/provisioning GF_AUTH_ANONYMOUS_ENABLED=true GF_AUTH_ANONYMOUS_ORG_ROLE=Viewer \
        GF_AUTH_DISABLE_LOGIN_FORM=true GF_AUTH_BASIC_ENABLED=false GF_ANALYTICS_REPORTING_ENABLED=false \
        GF_ANALYTICS_CHECK_FOR_UPDATES=false GF_ANALYTICS_CHECK_FOR_PLUGIN_UPDATES=false GF_LOG_LEVEL=warn \
        GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH=$NSDRAY_DASHBOARDS/overview.json \
        grafana-server --homepath "$home" &
    running+=($!)
    echo "Grafana:    http://127.0.0.1:$GRAFANA_PORT"
else
    echo "Grafana is not installed (grafana.com/grafana/download); Prometheus answers the same expressions on its own page," \
        "and dashboards/check.py prints them."
fi
echo "Ctrl-C ends. Now start a job, e.g. make demo."
wait -n "${running[@]}"  # the first to end takes the other with it
