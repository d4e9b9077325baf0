#!/bin/bash
. "$(dirname "$0")/lib.sh"
# the usual umask; the source image is for its owner alone (0600): who may read the copy at the replica?
umask 022; D=$W/images; mkdir "$D"; mk "$D/vm.qcow2" 8M; chmod 600 "$D/vm.qcow2"; io "$D/vm.qcow2" 'write -P 65 0 1M'
snapchain send "$D/vm.qcow2" "dir:$W/vault::web1/vda" >/dev/null || skip send
f=$(ls "$W"/vault/*/vm.qcow2)
asnobody cat "$f" 2>/dev/null | grep -qa AAAAAAAA && bad "any local user reads the guest's disk at the replica: $(stat -c '%a' "$W/vault") $(stat -c '%a' "$(dirname "$f")") $(stat -c '%a' "$f"), source was 600"
ok "not readable"
