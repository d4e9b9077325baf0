#!/bin/bash
. "$(dirname "$0")/lib.sh"
# .NAME.snapchain-part is a hard link to a file that the user may write but not truncate as root's work; and a FIFO
mk "$W/a.qcow2" 1M; snapchain init "$W/repo" >/dev/null; snapchain ship "$W/a.qcow2" "$W/repo::a" >/dev/null
D=$W/shared; mkdir -m 777 "$D"; echo "shared log" > "$W/victim"; chmod 666 "$W/victim"; asnobody ln "$W/victim" "$D/.o.raw.snapchain-part" || skip link
timeout 20 snapchain restore "$W/repo::a" "$D/o.raw" >/dev/null 2>"$W/e"; rc=$?
grep -q 'shared log' "$W/victim" || bad "a hard link under the temporary name was emptied and written over (rc $rc)"
ok "rc $rc"
