"""Verbs of root under swaps by the owner of the images, from the command line; as root.

python -m tests.swaps                                       # all attacks on all verbs: hours
python -m tests.swaps --each 50 snapshot merge-commit       # every fiftieth attack on two verbs
python -m tests.swaps snapshot --only 17.0:link-to-secret   # one attack, and what the command says
    python -m tests.swaps snapshot --trace --only 17.0:parent   # and which line of code it leads outside
python -m tests.swaps snapshot --sites --each 9             # the lines of code where harm was done
python -m tests.swaps snapshot --list                       # the names that it looks up
python -m tests.swaps --look                                # with what is no harm, too
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path

from tests.exhaustive import EXHAUSTIVE
from tests.swaps.attacks import Attack
from tests.swaps.campaign import Campaign, Finding, preload
from tests.swaps.verbs import VERBS, Verb
from tests.swaps.world import place_of_its_own


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.swaps")
    parser.add_argument("verbs", nargs="*")
    parser.add_argument("--each", type=int, default=1)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--only", default=None)
    parser.add_argument("--trace", action="store_true")
    parser.add_argument("--sites", action="store_true")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--look", action="store_true")
    given = parser.parse_args()
    by_name = {verb.name: verb for verb in VERBS}
    if unknown := set(given.verbs) - set(by_name):
        parser.error(f"no such verb: {', '.join(unknown)}; there are {', '.join(by_name)}")
    preload()
    harm = 0
    for verb in [by_name[name] for name in given.verbs] or VERBS:
        with place_of_its_own() as place:
            harm += _attacked(verb, given, place)
    return 1 if harm else 0


def _attacked(verb: Verb, given: argparse.Namespace, place: Path) -> int:
    seen: dict[str, list[str]] = {}
    sites: dict[str, list[list[Finding]]] = {}
    started = time.monotonic()
    runs = harm = total = 0
    campaign = None
    try:
        campaign = Campaign(verb, place)
        found = list(campaign.record())
        attacks = list(campaign.attacks())
        total = len(attacks)
        if given.list:
            for name in campaign.names:
                print(f"{name.number}.{name.step} {name.label.replace(f'{place}/', '')}")
            attacks = []
        elif given.only is not None:
            attacks = [Attack.parse(given.only)]
        else:
            attacks = attacks[given.start :: 1 if EXHAUSTIVE else given.each]
        for attack in attacks:
            did = list(campaign.attack(attack, trace=given.trace))
            found += did
            runs += 1
            if given.sites and any(finding.harm for finding in did):
                sites.setdefault(_site(campaign, attack), []).append(did)
            if given.only:
                print((campaign.world.logs / "stdout").read_text(), (campaign.world.logs / "stderr").read_text())
        for finding in found:
            if finding.harm or given.look:
                key = f"{finding.verb} [{finding.attack}] {finding.where}"
                seen.setdefault(key, []).append(finding.what if finding.harm else f"(look: {finding.what})")
            harm += finding.harm
    except AssertionError as error:
        print(f"{verb.name}: {error}")
        return 1
    finally:
        if campaign is not None:
            campaign.close()
    for site, attacked in sorted(sites.items(), key=lambda each: -len(each[1])):
        first = "; ".join(finding.what for finding in attacked[0] if finding.harm)
        print(f"{len(attacked):4} {site}\n       as {verb.name} --only {attacked[0][0].attack}: {first}")
    for where, what in {} if given.sites else seen.items():
        print(f"{where}: {'; '.join(what)}")
    calls = len({name.number for name in campaign.names})
    took = time.monotonic() - started
    print(f"{verb.name}: {calls} calls, {runs} of {total} attacks, {harm} harms, {took:.1f} s", flush=True)
    return harm


def _site(campaign: Campaign, attack: Attack) -> str:
    """The lines of snapchain where the first call was made that the attack leads outside, innermost last."""
    list(campaign.attack(attack, trace=True))
    said = (campaign.world.logs / "stderr").read_text()
    frames = re.findall(r'File "[^"]*/snapchain/([^"]+)", line (\d+) in (\w+)', said)
    return " < ".join(f"{name}:{line} {function}" for name, line, function in frames[:4]) or campaign.where(attack)


if __name__ == "__main__":
    sys.exit(main())
