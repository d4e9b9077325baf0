#!/bin/bash
. "$(dirname "$0")/lib.sh"
# no race: a guest's bytes, restored by root into the user's directory, are a root-owned file that the user renames into a journal
D=$W/images; mkdir "$D"; mk "$D/vm.qcow2" 1M
V=$W/root-only; mkdir -m 700 "$V"; echo precious > "$V/file"
$PY - "$D" "$V/file" > "$W/guest.raw" <<'P'
import json, os, sys
d, v = sys.argv[1:3]; me = os.stat(f"{d}/vm.qcow2"); vs = os.stat(v)
f = {"path": f"{d}/vm.qcow2", "device": me.st_dev, "inode": me.st_ino}
j = {"version": 2, "stage": "switching", "replaced": f, "result": f, "lowest": f"{d}/vm.qcow2", "link": None,
     "remove": [{"path": v, "device": vs.st_dev, "inode": vs.st_ino}], "kept_as": None, "search": []}
print(json.dumps(j).ljust(4095))
P
qemu-img convert -f raw -O qcow2 "$W/guest.raw" "$D/vm2.qcow2"; chown -R 65534:65534 "$D"
snapchain init "$W/repo" >/dev/null; snapchain ship "$D/vm2.qcow2" "$W/repo::a" >/dev/null || skip ship
snapchain restore "$W/repo::a" "$D/old.raw" >/dev/null || skip restore
asnobody mv "$D/old.raw" "$D/.snapchain-merge-vm.qcow2.json"
snapchain doctor "$D" >"$W/out" 2>"$W/err"; rc=$?
[ -e "$V/file" ] && ok "kept (rc $rc: $(head -1 "$W/out" "$W/err" | tr '\n' ' '))"
bad "doctor as root deleted a root-only file: a restored guest disk, renamed by the user, was believed as a journal"
