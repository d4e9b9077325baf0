#!/bin/bash
. "$(dirname "$0")/lib.sh"
# OUT does not exist when the operator chooses it; a user who may write there plants a link to a block device: no --force is asked
mk "$W/a.qcow2" 16M; io "$W/a.qcow2" 'write -P 65 0 1M'; snapchain init "$W/repo" >/dev/null; snapchain ship "$W/a.qcow2" "$W/repo::a" >/dev/null || skip ship
truncate -s 16M "$W/disk"; printf 'another VM' | dd of="$W/disk" conv=notrunc 2>/dev/null
L=$(losetup -f --show "$W/disk") || skip "no loop device"; LOOPS+=("$L")
D=$W/shared; mkdir "$D"; chmod 777 "$D"; asnobody ln -s "$L" "$D/old.raw"
snapchain restore "$W/repo::a" "$D/old.raw" >/dev/null 2>"$W/err"; rc=$?
sync; blockdev --flushbufs "$L"
head -c 10 "$W/disk" | grep -q 'another VM' && ok "device untouched, rc $rc: $(head -1 "$W/err")"
bad "a link planted by another user at OUT made root overwrite block device $L without --force (rc $rc)"
