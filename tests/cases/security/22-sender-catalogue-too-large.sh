#!/bin/bash
. "$(dirname "$0")/lib.sh"
mkdir "$W/vault"
cat >"$W/t.py" <<'P'
import sys, os; from hs import *
root = sys.argv[1]; labels = ["\U0001F600" * 98 + f"{i:02}" for i in range(100)]
said, rc, s, rss, err = talk(root, seed(root, "d", points=[point(0)])); assert said[-1][0] == "DONE", (said, err)
done = 0
for r in range(3):
    pts = [point(1 + r * 190 + i, labels) for i in range(190)]
    said, rc, s, rss, err = talk(root, seed(root, "d", points=pts), timeout=300)
    print(r, said[-1][0], said[-1][1][:200], rc, round(s, 1), rss, os.path.getsize(root + "/d/catalogue.json"), file=sys.stderr)
    if said[-1][0] != "DONE": break
P
PYTHONPATH=$HERE $PY "$W/t.py" "$W/vault" 2>"$W/o"; tail -3 "$W/o" >&2
snapchain log "dir:$W/vault::d" >"$W/o2" 2>"$W/e2"; rc=$?
snapchain restore "dir:$W/vault::d" "$W/x.raw" >/dev/null 2>"$W/e3"; rc3=$?
[ $rc3 -ne 0 ] && bad "points with many labels made the catalogue larger ($(stat -c %s "$W/vault/d/catalogue.json")) than what is ever read again: log $rc, restore $rc3: $(head -1 "$W/e3" | cut -c1-140)"
ok "log $rc, restore $rc3"
