"""As an unprivileged user who owns DIR: as soon as a name matching PATTERN appears, put a symlink to TARGET there."""
import os, re, sys, time
d, pattern, target, seconds = sys.argv[1], re.compile(sys.argv[2]), sys.argv[3], float(sys.argv[4])
delay = float(sys.argv[5]) if len(sys.argv) > 5 else 0
end = time.monotonic() + seconds
os.chdir(d)
print("watching", flush=True)
while time.monotonic() < end:
    for n in os.listdir("."):
        if pattern.fullmatch(n) and not os.path.islink(n):
            time.sleep(delay)
            try:
                os.unlink(n); os.symlink(target, n); print("swapped", n, flush=True)
            except OSError as e:
                print(e, flush=True)
