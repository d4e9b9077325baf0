#!/bin/bash
. "$(dirname "$0")/lib.sh"
# the disk was migrated to the replica's host, its guest runs there (overlay open); any key of that root says one frame
mk "$W/a.qcow2" 8M; io "$W/a.qcow2" 'write 0 64k'
snapchain migrate "$W/a.qcow2" "dir:$W/vault::d" --offline >"$W/o" 2>&1 || skip "$(head -1 "$W/o")"
A=$(ls "$W"/vault/d/active/*.qcow2)
mkfifo "$W/f"; qemu-io -f qcow2 "$A" <"$W/f" >"$W/guest" 2>&1 & PIDS+=($!); exec 3>"$W/f"; echo 'read 0 512' >&3
until grep -q 'read 512/512' "$W/guest"; do kill -0 "${PIDS[0]}" 2>/dev/null || skip "no guest: $(tail -1 "$W/guest")"; sleep 0.1; done
cat >"$W/t.py" <<'P'
import sys, json; from hs import *
root = sys.argv[1]; o = {"name":"a.qcow2","size":8<<20,"cluster_size":65536,"extended_l2":False,"on":"0"*32,"make":False,"prove":False}
r = []
said, *_ = talk(root, stream(HELLO, (16, {"step":"back","token":"f"*32,"replica":root,"disks":[{"disk":"d","epoch":3,"overlay":o}]})))
r.append(("back with a foreign token", [k for k, _ in said if k in ("HANDED","FAIL")]))
said, *_ = talk(root, stream(HELLO, OPEN("d", root, epoch=4), STOP)); r.append(("open epoch 4", [k for k, _ in said if k in ("INVENTORY","FAIL")]))
c = json.load(open(root + "/d/catalogue.json")); print(r, "handover", c["handover"] and c["handover"]["epoch"], "epoch", c["epoch"], "taken_back", c["taken_back"])
P
o=$(PYTHONPATH=$HERE $PY "$W/t.py" "$W/vault" | tail -1)
case $o in *"handover None"*) bad "while the guest runs on the overlay: $o";; esac; ok "$o"
