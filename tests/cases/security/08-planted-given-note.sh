#!/bin/bash
. "$(dirname "$0")/lib.sh"
# a note planted by another user in the images' directory (root's image there): its hint and what --take-back does with `mode`
D=$W/images; mkdir "$D"; mk "$D/vm.qcow2" 8M; io "$D/vm.qcow2" 'write 0 64k'; chmod 640 "$D/vm.qcow2"; chmod 777 "$D"   # image is root's
snapchain send "$D/vm.qcow2" "dir:$W/vault::d" >/dev/null
cat >"$W/p.py" <<'P'
import json, os, sys
d, vault = sys.argv[1:3]; os.chdir(d); s = os.stat("vm.qcow2")
n = {"version":1,"name":"vm.qcow2","inode":s.st_ino,"size":s.st_size,"mtime_ns":s.st_mtime_ns,"holds":[],"sealed":None,"merged":[],"epoch":1,
 "given":{"destination":"dir:"+vault,"disk":"d","epoch":2,"token":"0"*32,"time":"2026-01-01T00:00:00Z","overlay":{"name":"vm.qcow2","layer":"0"*32,"virtual_size":8<<20,"cluster_size":65536,"extended_l2":False},"together":["d"],"mode":0o6777,"confirmed":True,"started":False}}
open(f".snapchain-layer-vm.qcow2-{s.st_ino}.json","w").write(json.dumps(n))
P
asnobody python3 "$W/p.py" "$D" "$W/vault"
snapchain snapshot "$D/vm.qcow2" >"$W/o" 2>&1
h=$(grep -o 'snapchain migrate[^`]*take-back' "$W/o" | head -1)
[ -z "$h" ] && { snapchain migrate "$D/vm.qcow2" "dir:$W/vault::d" --take-back >"$W/o2" 2>&1; } || eval "$h" >"$W/o2" 2>&1
m=$(stat -c %a "$D/vm.qcow2"); [ "$m" != 640 ] && bad "after the command that the hint names, root's image has mode $m, from a note that nobody planted"
ok "mode $m; hint: ${h:-none}; $(head -1 "$W/o2" | cut -c1-120)"
