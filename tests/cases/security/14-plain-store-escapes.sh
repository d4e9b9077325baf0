#!/bin/bash
. "$(dirname "$0")/lib.sh"
# an unencrypted repository in hostile hands: a label and a hold with terminal escapes, forged (suite none has public keys)
mk "$W/a.qcow2" 1M; unset SNAPCHAIN_PASSWORD; snapchain init --no-encryption "$W/repo" >/dev/null; snapchain ship "$W/a.qcow2" "$W/repo::a" --label x >/dev/null
cat >"$W/f.py" <<'P'
import glob, json, sys
from snapchain.repository.envelope import seal, unseal
from snapchain.repository.opening import open_repository
k = open_repository(sys.argv[1], passphrase=lambda: None).keys
p = sorted(glob.glob(sys.argv[1] + "/disks/*/*"))[-1]; name = p[len(sys.argv[1])+1:]
j = json.loads(unseal(k, b"C", name, open(p, "rb").read()))
j["points"][0]["labels"] = ["ok\u001b]0;owned\u0007\u001b[2J"]
open(p, "wb").write(seal(k, b"C", name, json.dumps(j).encode()))
P
$PY "$W/f.py" "$W/repo" || bad "no label was forged"
snapchain log "$W/repo" >"$W/out" 2>&1; rc=$?
grep -q $'\033' "$W/out" && bad "log prints a forged label's terminal escapes raw (rc $rc)"
ok "rc $rc, no escape: $(tail -1 "$W/out")"
