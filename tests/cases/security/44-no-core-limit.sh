#!/bin/bash
. "$(dirname "$0")/lib.sh"
# can a crash of snapchain itself write its keys to a core file? (its children have RLIMIT_CORE 0)
mk "$W/a.qcow2" 1M; snapchain init "$W/repo" >/dev/null; ulimit -c unlimited
snapchain ship "$W/a.qcow2" "$W/repo::a" --password-command "sh -c 'grep -i core /proc/\$PPID/limits > $W/l; echo secret'" >/dev/null 2>&1
grep -q unlimited "$W/l" 2>/dev/null && bad "RLIMIT_CORE of the process that holds the keys: $(tr -s ' ' < "$W/l")"; ok "$(cat "$W/l" 2>/dev/null)"
