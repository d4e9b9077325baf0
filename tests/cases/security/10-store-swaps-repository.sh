#!/bin/bash
. "$(dirname "$0")/lib.sh"
# two encrypted repositories of one passphrase; the store puts the older one, whole, in the place of the newer (same machine)
mk "$W/a.qcow2" 16M; io "$W/a.qcow2" 'write -P 1 0 1M'
snapchain init "$W/repo" >/dev/null; snapchain ship "$W/a.qcow2" "$W/repo::vm/vda" >/dev/null
cp -a "$W/repo" "$W/old"; rm -rf "$W/repo"; rm -rf "$HOME/.local"   # an old repository of the same passphrase, kept by the store
snapchain init "$W/repo" >/dev/null; io "$W/a.qcow2" 'write -P 9 0 1M'; snapchain ship "$W/a.qcow2" "$W/repo::vm/vda" >/dev/null; io "$W/a.qcow2" 'write -P 10 0 1M'; snapchain ship "$W/a.qcow2" "$W/repo::vm/vda" >/dev/null
snapchain log "$W/repo" >/dev/null || skip log
mv "$W/repo" "$W/new"; cp -a "$W/old" "$W/repo"
snapchain restore "$W/repo::vm/vda" "$W/out.raw" >/dev/null 2>"$W/err"; rc=$?
[ $rc -ne 0 ] && ok "refused, rc $rc: $(head -1 "$W/err")"
b=$(od -An -tx1 -N1 "$W/out.raw"); rm -rf "$W/repo"; cp -a "$W/new" "$W/repo"
# now the memory of the newer one is gone too: roll its disk back by one generation
f=$(ls "$W"/repo/disks/*/* | sort | tail -1); rm "$f"
snapchain restore "$W/repo::vm/vda" "$W/out2.raw" >/dev/null 2>"$W/err"; rc2=$?
bad "another repository id at a known address is taken without a word: restore rc 0 gave byte$b of the old one (expected 0a); afterwards rollback by one generation is taken too (rc $rc2)"
