#!/usr/bin/env bash
# Starts a continuator on a free port, asks it three questions through the edge, and stops it.
#
# In reality the two run on two machines. Here each gets cores of its own where there are two, and passive waiting: both runtimes
# otherwise spin while they wait and take each other's time.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_WAIT_POLICY=passive

edge=() cloud=()
cores=$(nproc)
if [ "$cores" -ge 2 ] && command -v taskset >/dev/null && taskset -c 0 true 2>/dev/null; then
  edge=(taskset -c 0) cloud=(taskset -c "1-$((cores - 1))")
fi
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
url="http://127.0.0.1:$port"
log=$(mktemp)
"${cloud[@]}" target/release/cloud-continuator serve --listen "127.0.0.1:$port" >"$log" 2>&1 &
server=$!
trap 'kill "$server" 2>/dev/null || true; wait "$server" 2>/dev/null || true; rm -f "$log"' EXIT

for _ in $(seq 300); do
  target/release/cloud-continuator check "$url" >/dev/null 2>&1 && break
  kill -0 "$server" 2>/dev/null || { echo "the continuator did not start:" >&2; cat "$log" >&2; exit 1; }
  sleep 0.1
done
target/release/cloud-continuator check "$url"
echo "The opener is the micro model's; what follows is the large model's."
for question in "Who painted the Mona Lisa?" "How do I boil an egg?" "Set a timer for ten minutes, please."; do
  printf '\n> %s\n' "$question"
  "${edge[@]}" target/release/edge-agent ask --server "$url" "$question"
done
