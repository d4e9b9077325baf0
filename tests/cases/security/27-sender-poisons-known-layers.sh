#!/bin/bash
. "$(dirname "$0")/lib.sh"
# another key of the same root (or the replica's host) puts other bytes under the recorded sources; the honest sender's next send
mk "$W/a.qcow2" 8M; io "$W/a.qcow2" 'write -P 65 0 1M'; export SNAPCHAIN_SSH
snapchain snapshot "$W/a.qcow2" >/dev/null; snapchain send "$W/a.qcow2" "dir:$W/vault::d" >/dev/null 2>&1
cat >"$W/t.py" <<'P'
import sys, json; from hs import *
root = sys.argv[1]
said, *_ = talk(root, stream(HELLO, OPEN("d", root, look=True), STOP)); inv = json.loads(said[1][1])
n, fr, parent = len(inv["layers"]), [], None
from snapchain.replica.stream.layers import layer_id
from snapchain.replica.stream.messages import LayerOffer
import numpy as np
size = 8 << 20; wz = (size // 65536) << 2
for at, l in enumerate(inv["layers"]):
    run = wz | (1 if at == 0 else 0)
    f = {"name": l["file"], "size": size, "cluster_size": 65536, "extended_l2": False, "parent": parent, "sources": l["sources"], "runs": 1, "resume_at": 0}
    fr += [(3, f), words(run), (7, bytes.fromhex(content_id_zero(size)))]
    parent = layer_id(LayerOffer(**f), np.array([run], np.uint64))
fr.append((8, {"time":"2026-01-01T00:00:00Z","labels":[],"size":size,"content_id":content_id_zero(size)}))
said, rc, s, rss, err = talk(root, stream(HELLO, OPEN("d", root), (12, {"keep": None}), *fr, STOP))
print(n, [k for k, _ in said], said[-1][1][:300])
P
PYTHONPATH=$HERE $PY "$W/t.py" "$W/vault" >"$W/o" 2>&1; grep -q DONE "$W/o" || skip "$(tail -1 "$W/o")"
io "$W/a.qcow2" 'write -P 66 4M 64k'; snapchain snapshot "$W/a.qcow2" >/dev/null
snapchain send "$W/a.qcow2" "dir:$W/vault::d" >"$W/s" 2>&1; rc=$?
snapchain verify "dir:$W/vault::d" --read-data >"$W/v" 2>&1; rv=$?
snapchain restore "dir:$W/vault::d" "$W/out.raw" >/dev/null 2>&1; rr=$?
qemu-img compare -q -f qcow2 -F raw "$W/a.qcow2" "$W/out.raw" >/dev/null 2>&1 && ok "send $rc: the replica shows the image"
[ $rc -ne 0 ] && ok "send refused, rc $rc: $(grep -m1 error "$W/s" | cut -c1-120)"
bad "send exit 0 on a base of other bytes; verify --read-data $rv, restore $rr, and the image's first MiB (0x41) is 0x$(od -An -tx1 -N1 "$W/out.raw" | tr -d ' ') there"
