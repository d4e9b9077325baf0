#!/bin/bash
. "$(dirname "$0")/lib.sh"
# the store plants one key slot at the allowed limits of Argon2id; up to 64 are tried
mk "$W/a.qcow2" 1M; snapchain init "$W/repo" >/dev/null; snapchain ship "$W/a.qcow2" "$W/repo::a" >/dev/null
$PY - "$W/repo/keys" <<'P'
import base64, json, sys
s = {"format":1,"kdf":"argon2id","memory_kib":1048576,"iterations":16,"lanes":1,"salt":base64.b64encode(bytes(32)).decode(),"wrapped":base64.b64encode(bytes(48)).decode()}
open(sys.argv[1] + "/" + "0"*32, "w").write(json.dumps(s))
P
read s m < <($PY -c 'import resource as r, subprocess, sys
subprocess.run(sys.argv[1:], stdout=-3, stderr=-3, timeout=120); u = r.getrusage(r.RUSAGE_CHILDREN)
print(round(u.ru_utime + u.ru_stime, 1), u.ru_maxrss)' snapchain log "$W/repo")
[ -n "${m:-}" ] || bad "log did not end within 120 s"
awk "BEGIN{exit !($s > 5)}" && bad "one planted slot costs $s s of processor time and $((m/1024)) MiB before the true one is tried; 64 may be planted ($(awk "BEGIN{print int($s*64/60)}") minutes at each open)"
ok "$s s, $((m/1024)) MiB"
