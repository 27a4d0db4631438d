#!/usr/bin/env bash
# Builds toxiproxy, the TCP proxy that spoils connections, from its Go module into .segue/peers/bin (needs Go 1.23 or later).
set -euo pipefail
cd "$(dirname "$0")/.."
version=v2.12.0
target=.segue/peers/bin/toxiproxy-server
if [ -x "$target" ]; then
  exit 0
fi
mkdir -p .segue/peers/bin
GOBIN="$PWD/.segue/peers/bin/new" GOFLAGS= go install "github.com/Shopify/toxiproxy/v2/cmd/server@$version"
mv .segue/peers/bin/new/server "$target"
rmdir .segue/peers/bin/new
