#!/bin/bash
. "$(dirname "$0")/lib.sh"
# root snapshots an image in a directory that its (unprivileged) owner can write to; the owner swaps the temporary overlay
D=$W/images; mkdir "$D"; mk "$D/vm.qcow2" 64M; io "$D/vm.qcow2" 'write -P 1 0 1M'; chown -R 65534:65534 "$D"
V=$W/etc-victim   # a root-only place; the file does not exist yet: think /etc/cron.d/x
mkdir -m 755 "$V"; echo 'root secret' > "$V/shadow"; chmod 600 "$V/shadow"
asnobody python3 "$W/swap.py" "$D" '\.vm\.qcow2\.snapshot-[0-9a-f]{8}' "$V/cron-new" 20 >"$W/log" & PIDS+=($!)
until grep -q watching "$W/log"; do kill -0 "${PIDS[0]}" 2>/dev/null || skip "nobody watches the directory"; sleep 0.1; done
for i in 1 2 3; do timeout 30 snapchain snapshot "$D/vm.qcow2" >/dev/null 2>"$W/err"; [ -e "$V/cron-new" ] && break; done
if [ -e "$V/cron-new" ]; then o=$(stat -c '%U' "$V/cron-new"); [ "$o" = nobody ] && bad "root created $V/cron-new (a file outside, through a swapped symlink) and gave it to nobody: local root, try $i"
  bad "root created a file outside through a swapped symlink, owner $o"; fi
ok "no file outside was made ($(tail -1 "$W/err"))"
