#!/bin/bash
. "$(dirname "$0")/lib.sh"
# root restores into a directory that another user can write to; he has made .NAME.snapchain-part before
mk "$W/a.qcow2" 16M; io "$W/a.qcow2" 'write -P 65 0 1M'; snapchain init "$W/repo" >/dev/null; snapchain ship "$W/a.qcow2" "$W/repo::a" >/dev/null || skip ship
D=$W/shared; mkdir "$D"; chmod 777 "$D"
asnobody sh -c "umask 0; : > $D/.old.raw.snapchain-part"
snapchain restore "$W/repo::a" "$D/old.raw" >/dev/null 2>"$W/err"; rc=$?
[ $rc -ne 0 ] && ok "refused: $(head -1 "$W/err")"
o=$(stat -c '%U %a' "$D/old.raw"); [ "${o% *}" = root ] && ok "owner is root"
asnobody dd if="$D/old.raw" bs=1 count=4 2>/dev/null | grep -q AAAA && r=readable || r=unreadable
asnobody dd if=/dev/zero of="$D/old.raw" bs=1M count=1 conv=notrunc 2>/dev/null && w="and was changed by him after exit 0"
bad "the restored disk belongs to '$o' (planted file taken up), $r $w"
