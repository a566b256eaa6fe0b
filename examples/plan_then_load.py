"""Load with the longest context that fits a budget: python examples/plan_then_load.py BUNDLE 2GiB

A plan costs nothing: it is made from the bundle's manifest, and nothing is loaded.
"""

import sys

import edge_gemma
from edge_gemma import Plan, plan_bundle


def longest(bundle: str, budget: str) -> Plan:
    """The plan with the most context. Raises PlanRefused when not even 512 tokens fit."""
    for n_ctx in (8192, 4096, 2048, 1024):
        plan = plan_bundle(bundle, budget=budget, n_ctx=n_ctx)
        if plan.fits:
            return plan
        print(f"{n_ctx} tokens of context need {plan.needed_bytes / 2**20:.0f} MiB")
    return plan_bundle(bundle, budget=budget, n_ctx=512).require()


def main(bundle: str, budget: str) -> None:
    plan = longest(bundle, budget)
    for item in plan.items:
        print(f"{item.bytes / 2**20:8.1f} MiB  {item.name}, {item.kind}")
    n_ctx = plan.settings.n_ctx
    print(f"{plan.total_bytes / 2**20:8.1f} MiB  with {n_ctx} tokens of context")
    with edge_gemma.load(bundle, budget=budget, n_ctx=n_ctx) as model:
        print(f"loaded, with {model.plan.settings.n_threads} threads")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
