#!/bin/bash
. "$(dirname "$0")/lib.sh"
# an S3 server that never ends: a body of 3 GB for a small object, listings that always go on, no length at all
export AWS_ACCESS_KEY_ID=a AWS_SECRET_ACCESS_KEY=b AWS_DEFAULT_REGION=us-east-1 AWS_MAX_ATTEMPTS=1; unset SNAPCHAIN_PASSWORD
for mode in chunked pages empty nolength; do
  P=$($PY -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
  $PY "$HERE/fakes3.py" $mode "$P" 2>/dev/null & PIDS+=($!)
  until (: >"/dev/tcp/127.0.0.1/$P") 2>/dev/null; do kill -0 $! 2>/dev/null || skip "no server"; sleep 0.1; done
  read rc m < <(SNAPCHAIN_S3_ENDPOINT=http://127.0.0.1:$P AWS_ENDPOINT_URL=http://127.0.0.1:$P $PY -c 'import resource as r, subprocess, sys
d = subprocess.run(sys.argv[1:], stdout=-3, stderr=open("'"$W/err"'", "wb"), timeout=120)
print(d.returncode, r.getrusage(r.RUSAGE_CHILDREN).ru_maxrss >> 10)' snapchain log s3://b/p)
  [ -n "${m:-}" ] || bad "log of a server in mode $mode did not end within 120 s"
  [ "$m" -lt 600 ] || bad "log of a server in mode $mode took $m MiB"
  [ "$rc" -ne 0 ] || [ $mode = nolength ] || bad "log of a server in mode $mode ended with 0"
  grep -q Traceback "$W/err" && bad "log of a server in mode $mode ended in a traceback"
  echo "$mode rc $rc $m MiB $(head -1 "$W/err")" >&2
done
ok "refused, last in $m MiB"
