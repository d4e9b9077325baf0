# sourced by the cases: a directory that every user may look into, a home and a passphrase of their own; ok/bad/skip
# print one line and end (0, 1, 2)
set -u; export PATH=$PATH:/usr/sbin:/sbin; command -v snapchain >/dev/null || { echo "snapchain is not in PATH"; exit 2; }
NAME=$(basename "$0" .sh); HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
W=$(mktemp -d "/var/tmp/case.XXXXXX"); chmod 755 "$W"; export HOME=$W/home; mkdir -m 700 "$HOME"; export SNAPCHAIN_PASSWORD=secret TZ=UTC
unset XDG_CACHE_HOME XDG_STATE_HOME SNAPCHAIN_IMAGE_DIRS
PY=$(head -1 "$(command -v snapchain)" | sed "s/^#!//")
cp "$HERE/swap.py" "$W"; chmod 644 "$W/swap.py"   # the other user need not be able to read this checkout
PIDS=(); LOOPS=()
cleanup() { for p in "${PIDS[@]:-}"; do [ -n "$p" ] && kill "$p" 2>/dev/null && wait "$p" 2>/dev/null; done
  for l in "${LOOPS[@]:-}"; do [ -n "$l" ] && losetup -d "$l" 2>/dev/null; done; rm -rf "$W"; }
trap cleanup EXIT
ok()  { echo "$NAME: safe: $*"; exit 0; }
bad() { echo "$NAME: UNSAFE: $*"; exit 1; }
skip() { echo "$NAME: could not run: $*"; exit 2; }
mk()  { qemu-img create -q -f qcow2 "$@"; }
io()  { local f=$1; shift; local a=(); for c in "$@"; do a+=(-c "$c"); done; qemu-io -f qcow2 "${a[@]}" "$f" >/dev/null; }
asnobody() { env -i PATH="$PATH" setpriv --reuid=65534 --regid=65534 --clear-groups "$@"; }
