"""launcher.py FILE PROGRAM...: run a program, and write its processor seconds and peak bytes of memory into FILE."""

import os
import sys

child = os.fork()
if not child:
    os.execvp(sys.argv[2], sys.argv[2:])
_, status, usage = os.wait4(child, 0)
with open(sys.argv[1], "w", encoding="ascii") as file:  # noqa: PTH123 - started without the import of anything large
    file.write(f"{usage.ru_utime + usage.ru_stime} {usage.ru_maxrss * 1024}")
sys.exit(os.waitstatus_to_exitcode(status))
