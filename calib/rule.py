"""The FPTQ rule (arXiv 2308.15987): which activation tier an input of a given range gets, and the words for it."""

from __future__ import annotations

from fptq_export.policy import Activation, LayerPolicy, Rule
from fptq_export.sites import Linear

__all__ = ["AUTO_REASON_START", "RULE_REASON_START", "float_layer", "tier_from_absmax"]

RULE_REASON_START = "max|x|"
"""Every reason that the rule gives starts with this, so a replay can tell it from a person's words."""
AUTO_REASON_START = "auto chose "
"""The same for `--policy auto`; what the layer runs (`LayerPolicy.runs`) and a colon follow."""


def tier_from_absmax(absmax: float, rule: Rule, linear: Linear) -> tuple[Activation, str]:
    """Apply the rule to one linear.

    Args:
        absmax: v, the largest magnitude of the input seen in calibration.
        rule: Thresholds v0 and v1, and the equalizer.
        linear: Says whether the input has an exact fold site.

    Returns:
        `static` for v <= v0; for v0 < v < v1 at a fold site `lae_static`, or `static` with an equalizer of its own;
        `per_token` otherwise, also for a linear of an expert that no token reached. And the reason.
    """
    measured = f"{RULE_REASON_START} {absmax:.6g}"
    if linear.expert is not None and absmax == 0.0:
        return "per_token", f"{measured}, for calibration routed no token to this expert: one INT8 scale a token"
    if absmax <= rule.v0:
        return "static", f"{measured} <= v0 {rule.v0:g}: one INT8 scale"
    if absmax >= rule.v1:
        return "per_token", f"{measured} >= v1 {rule.v1:g}: one INT8 scale a token"
    between = f"{measured} between v0 {rule.v0:g} and v1 {rule.v1:g}"
    if linear.site is None:
        return "per_token", f"{between}, but no fold site ({linear.no_site_reason}): one INT8 scale a token"
    if rule.equalizer == "none":
        return "per_token", f"{between}, but nothing is equalized: one INT8 scale a token"
    if rule.equalizer != "paper":
        return "static", f"{between}, at a site for {rule.equalizer} ({linear.site}): one INT8 scale"
    return "lae_static", f"{between}: equalized at {linear.site}, then one INT8 scale"


def float_layer(linear: Linear, reason: str) -> LayerPolicy:
    """The entry of a linear that keeps the float precision, and why."""
    return LayerPolicy(
        precision="float",
        activation=None,
        reason=reason,
        in_features=linear.in_features,
        out_features=linear.out_features,
        site=linear.site,
    )
