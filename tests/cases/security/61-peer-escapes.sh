#!/bin/bash
. "$(dirname "$0")/lib.sh"
# the host of a replica answers with terminal escapes in every text that it may choose: errors, versions, names, labels
mk "$W/a.qcow2" 1M; export SNAPCHAIN_SSH="$HERE/peer.py" MODE; n=0
for c in "stderr log ssh://h/vault" "fail log ssh://h/vault" "ask log ssh://h/vault" "asklabels log ssh://h/vault::d" \
    "fail send $W/a.qcow2 ssh://h/vault::d" "inv send $W/a.qcow2 ssh://h/vault::d"; do
  MODE=${c%% *}; c=${c#* }
  timeout 60 snapchain $c >"$W/out" 2>&1; rc=$?
  [ $rc = 124 ] && bad "$c against MODE=$MODE never ends"
  LC_ALL=C grep -q $'[\033\007]' "$W/out" && bad "$c prints the escapes of a peer raw (MODE=$MODE, rc $rc)"
  grep -q Traceback "$W/out" && bad "$c ends in a traceback (MODE=$MODE)"
  grep -qE '(x1b|\?)\]0;owned|control characters' "$W/out" && n=$((n+1)) || echo "$MODE $c: $(cat "$W/out")" >&2
done
[ $n -ge 6 ] || skip "the texts of the peer appeared in $n answers only"
ok "$n answers without an escape"
