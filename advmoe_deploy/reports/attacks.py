"""Attacks in words."""

from advmoe_deploy.specs import AttackSpec


def attack_title(attack: AttackSpec) -> str:
    """Return a few words: name, steps, target, and what else sets the attack apart."""
    words = [attack.name if attack.name == "autoattack" else f"{attack.name}-{attack.steps}"]
    words += [attack.target] if attack.target != "model" else []
    words += [f"{attack.temperature:g}"] if attack.target == "soft" else []
    if attack.name == "pgd":
        words += [attack.loss] if attack.loss != "cross-entropy" else []
        words += [f"{attack.classes} targets"] if attack.classes else []
        words += [f"x{attack.restarts}"] if attack.restarts > 1 else []
    return " ".join(words)
