"""A hostile sender: frames made by hand, spoken to `snapchain serve-replica --stdio --root DIR`."""
import json, os, struct, subprocess, sys, time, resource
from blake3 import blake3
MAGIC = b"snapchain-stream"
NAMES = {1:"HELLO",11:"FAIL",32:"INVENTORY",33:"ACK",34:"STORED",35:"DONE",36:"READINESS",37:"DISK",38:"VERDICT",39:"FINDING",40:"PROGRESS",41:"MERGED",42:"HANDED",10:"BEAT"}
def stream(*frames):
    out, check = [MAGIC], blake3(MAGIC).digest(16)
    for kind, body in frames:
        if not isinstance(body, bytes): body = json.dumps(body, ensure_ascii=False).encode()
        head = struct.pack("<BBHI", kind, 0, 0, len(body)); check = blake3(check + head + body).digest(16); out += [head, body, check]
    return b"".join(out)
HELLO = (1, {"first":1,"last":1,"software":"x","features":["active","ask","epoch","merge","handover","fetch"],"answers":True})
def OPEN(disk, replica, **k): return (2, {"disk":disk,"replica":replica,**k})
STOP = (9, b"")
def layer(**k): return (3, {"name":"a.qcow2","size":65536,"cluster_size":65536,"extended_l2":False,"parent":None,"sources":[],"runs":1,"resume_at":0,**k})
def words(*runs): return (4, struct.pack("<II", len(runs), 0) + b"".join(struct.pack("<Q", r) for r in runs))
def talk(root, raw, timeout=60, env=None):
    """(frames said, exit status, seconds, peak RSS of all children so far in KiB, stderr)"""
    t = time.monotonic()
    p = subprocess.Popen(["snapchain","serve-replica","--stdio","--root",str(root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)
    try: out, err = p.communicate(raw, timeout=timeout)
    except subprocess.TimeoutExpired: p.kill(); out, err = p.communicate(); err += b"\nTIMEOUT"
    said, at = [], 16
    while at + 8 <= len(out):
        kind, _, _, n = struct.unpack_from("<BBHI", out, at); said.append((NAMES.get(kind, kind), out[at+8:at+8+n])); at += 24 + n
    rss = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return said, p.returncode, time.monotonic() - t, rss, err
def content_id_zero(size):
    from snapchain.model.content import content_id, empty_sum
    return content_id(size, empty_sum())
def seed(root, disk, size=65536, points=(), name="a.qcow2", epoch=1, extra=()):
    k = {"epoch": epoch} if epoch > 1 else {}
    return stream(HELLO, OPEN(disk, str(root), **k), layer(size=size, name=name), words((size // 65536) << 2 | 1), (7, bytes.fromhex(content_id_zero(size))), *points, *extra, STOP)
def point(n, labels=()): return (8, {"time": f"2026-01-01T{n//3600%24:02}:{n//60%60:02}:{n%60:02}.{n//86400:06}Z","labels":list(labels),"size":65536,"content_id":content_id_zero(65536)})
