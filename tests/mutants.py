# SPDX-License-Identifier: Apache-2.0
"""Do the tests notice wrong code? Plants one fault at a time in a copy of the tree and runs the tests of that file.

``make mutants`` runs it; ``make mutants ARGS="--per-file 3 maps/affine.py"`` takes three mutants of one file. The
operators are those of cosmic-ray that make plausible faults, and one that leaves out a term, a factor or a statement.
The choice is by a fixed seed, at most one mutant a line; what only changes an error's words is left out. torch, Pyro
and escnn are loaded once, each mutant is a fork. A mutant on which no test fails is printed: equivalent code, or a test
that is missing.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import difflib
import functools
import gc
import importlib
import io
import os
import pathlib
import random
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator

#: For each file, the test modules that ask most of it, the quickest first, and which of their tests.
TESTS: dict[str, tuple[str, str]] = {
    "transforms/actnorm.py": (
        "transforms cache pyro_contract properties errors flows registration",
        "test_actnorm or one_default or waiting or set_before or actnorm-O2] or actnorm-C4] or actnorm-C4-plane]",
    ),
    "maps/affine.py": (
        "transformers transforms pyro_contract properties",
        "generator or rotation_in or scales_on or parameters_are or commutant or identity_init or [coupling-O2]",
    ),
    "transforms/base.py": (
        "pyro_contract properties cache errors contraction_pyro transforms registration precision architecture",
        "test_precision or test_architecture or every_case and (linear-O2] or residual-O2]) "
        "or test_call and (linear or residual) or inverse_is and linear "
        "or torch_func and linear or test_cache and (linear or residual-O2) or with_cache "
        "or test_errors and (linear or coupling-O2) or nobody or mode_of_the_day or equality or one_default "
        "or inverse-of-coupling or one_inverse or under_the_inverse",
    ),
    "maps/block_map.py": (
        "transformers transforms pyro_contract properties iaf",
        "parameters_are or scales_on or identity_init or coupling-C4] or coupling-spline-C4] or iaf-C4] "
        "or coupling-commutant-C4-plane] or coupling-spline-C4-plane] or block_triangular",
    ),
    "maps/blocks.py": (
        "transforms errors flows iaf",
        "scales_on or layouts or split or direct_sums or every_channel or take_turns or blocks or keeps_one",
    ),
    "transforms/compose.py": (
        "transforms errors pyro_contract properties squeeze contraction_pyro",
        "test_compose or wrong_parts or flow-O2] or squeeze-D4-plane] or in_a_stack or nobody",
    ),
    "transforms/conditional.py": (
        "transforms errors pyro_contract contraction_pyro iaf registration",
        "conditional or context or twins and (coupling or iaf) and (O2] or C4-plane]) or one_default",
    ),
    "transforms/contracting.py": ("certified_errors contraction", "test_certified_errors or test_contraction"),
    "transforms/contraction.py": (
        "errors contraction_pyro contraction pyro_contract contraction_gradients flows",
        "test_errors and solved or stacks_of_solved or bound or nobody or converge or solvers_and or below_rounding "
        "or inverse_of or mode_of or every_sample or solutions_ask or half_answer or residual-O2] or implicit-O2] "
        "or implicit-C4-plane] or finite_differences and C4 and not plane or wrong_sign",
    ),
    "transforms/coupling.py": (
        "transforms architecture errors transformers registration",
        "(transforms or errors) and coupling or architecture or split or identity_init or context "
        "or scales_on or default",
    ),
    "transforms/iaf.py": (
        "iaf architecture transforms pyro_contract registration",
        "test_iaf or architecture or identity_init or [iaf-O2] or [iaf-C4-plane] or default",
    ),
    "transforms/implicit.py": (
        "errors arguments registration contraction_pyro pyro_contract contraction_gradients flows",
        "test_errors and solved or arguments and implicit or implicit-O2] or implicit-C4-plane] or default or identity "
        "or implicit and (nobody or converge or law or bound) or finite_differences and implicit and SO2",
    ),
    "transforms/described.py": ("architecture", "test_architecture"),
    "transforms/linear.py": (
        "transforms pyro_contract properties",
        "test_linear or turns_of_linear or linear-C4] or linear-O2] or linear-SO2] or linear-D3] or linear-C4-plane]",
    ),
    "transforms/memory.py": ("cache", "test_cache"),
    "transforms/multiscale.py": (
        "images pyro_contract properties registration",
        "level or goes or go_on or multiscale or volumes or default",
    ),
    "transforms/precision.py": ("precision", "test_precision"),
    "transforms/residual.py": (
        "errors arguments registration contraction_pyro pyro_contract contraction_gradients flows",
        "test_errors and solved or arguments and residual or residual-O2] or residual-C4-plane] or default or identity "
        "or residual and (nobody or converge or law or bound) or finite_differences and residual and SO2",
    ),
    "ops/channels.py": (
        "transforms transformers images",
        "every_channel or take_turns or split or coupling or spline or multiscale or goes",
    ),
    "maps/spline.py": (
        "transformers pyro_contract properties",
        "spline or radial or parameters_are or knot or coupling-spline-C4] or coupling-spline-O2] or iaf-spline-O2]",
    ),
    "transforms/squeeze.py": (
        "squeeze properties pyro_contract volumes",
        "test_squeeze and not octahedral or squeeze-D4 or equivariant_squeeze]",
    ),
    "solvers/adjoint.py": (
        "solvers contraction_gradients",
        "adjoint or grad or derivative or backward or differences and C4] and inverse",
    ),
    "solvers/checks.py": ("solvers arguments", "test_solvers and not memory or arguments and (fixed_point or olve)"),
    "solvers/functional.py": (
        "torch_func",
        "closed_form or small_upstreams or hidden or failures or a_sample and implicit or hessians and implicit",
    ),
    "solvers/iteration.py": ("solvers", "test_solvers and not memory"),
    "solvers/methods.py": ("solvers", "test_solvers and not memory"),
    "solvers/problem.py": (
        "solvers arguments torch_func",
        "test_solvers and not memory or closed_form or a_sample and implicit or single_precision "
        "or arguments and fixed_point",
    ),
    "solvers/root.py": (
        "solvers arguments contraction_pyro",
        "test_solvers and not memory or not_converged or arguments and fixed_point",
    ),
    "logdet/base.py": ("logdet", "test_logdet"),
    "logdet/exact.py": ("logdet contraction", "test_logdet or steep_networks"),
    "logdet/policy.py": ("logdet contraction", "test_logdet or roulette_is"),
    "logdet/probes.py": ("logdet", "test_logdet"),
    "logdet/series.py": ("logdet", "test_logdet"),
    "infer/alignment.py": ("alignment", "test_alignment"),
    "infer/nearest.py": ("alignment", "test_alignment"),
    "infer/actions.py": ("infer invariance guides", "representations or matri or invarian or average"),
    "infer/auto_orbit_mixture.py": ("guides", "average"),
    "infer/autoguide.py": ("infer augment guides guides_more", "test_infer and not demo and not hmc or guide"),
    "infer/averaged_guide.py": ("infer guides guides_more", "not demo and not hmc"),
    "infer/cosets.py": ("guides", "built_in or connected"),
    "infer/param_store.py": ("infer", "store"),
    "infer/starts.py": ("guides", "start or single"),
    "infer/supports.py": ("guides guides_more", "support or far or drawn_in"),
    "infer/evidence.py": ("evidence infer augment registration", "evidence or weights or weigh or chain or default"),
    "infer/diagnostics.py": ("diagnostics", "test_diagnostics"),
    "infer/pareto.py": ("diagnostics", "test_diagnostics"),
    "infer/path_gradient.py": ("path_gradient", "test_path_gradient"),
    "infer/importance.py": ("importance", "test_importance"),
    "infer/invariance.py": ("invariance infer", "test_invariance or invariant or symmetry or likelihood or draws"),
    "infer/joint_density.py": ("invariance", "test_invariance"),
    "infer/enumeration.py": ("invariance", "test_invariance"),
    "infer/latents.py": ("infer augment", "packing or supports or representations or evidence or fields or predictive"),
    "infer/quantiles.py": ("infer augment", "quantile or guide_in_use"),
    "distributions/invariant_normal.py": ("distributions", "test_distributions and not space"),
    "distributions/orbit.py": ("guides distributions", "matri or mixture or average"),
    "distributions/orbit_mixture.py": ("distributions", "test_distributions and not space"),
    "distributions/augmented.py": ("augment", "augment and not guide and not other_objectives"),
    "ops/named_groups.py": ("field_types", "test_field_types"),
    "ops/rounding.py": ("precision", "estimate"),
    "ops/cells.py": ("squeeze images", "test_squeeze and not octahedral or the_laws_of_a_level or types"),
}

#: Operators whose faults a programmer might make; cosmic-ray has more, most of which only raise TypeErrors.
PLAUSIBLE = re.compile(
    r"core/(ReplaceBinaryOperator_(Add_Sub|Sub_Add|Mul_Div|Div_Mul|FloorDiv_Mul|Mod_FloorDiv|Pow_Mul)"
    r"|ReplaceComparisonOperator_(Eq_NotEq|NotEq_Eq|Lt_LtE|Lt_GtE|LtE_Lt|LtE_Gt)"
    r"|ReplaceComparisonOperator_(Gt_GtE|Gt_LtE|GtE_Gt|GtE_Lt|Is_IsNot|IsNot_Is)"
    r"|ReplaceUnaryOperator_Delete_(USub|Not)|AddNot|Replace(True|False|And|Or|Break|Continue)With\w+|NumberReplacer"
    r"|RemoveDecorator|ZeroIterationForLoop)"
)


class LeaveOut:
    """Leaves out the last operand of a sum or a product, or a statement that is a call or changes a name in place."""

    def mutation_positions(self, node):
        if self._is_sum(node):
            yield node.children[-2].start_pos, node.end_pos
        elif node.type == "simple_stmt" and self._is_action(node.children[0]):
            yield node.start_pos, node.end_pos

    @staticmethod
    def _is_sum(node):
        return node.type in ("arith_expr", "term") and len(node.children) >= 3

    @staticmethod
    def _is_action(node):
        in_place = node.type == "expr_stmt" and node.children[1].type == "operator" and node.children[1].value != "="
        return in_place or node.type in ("atom_expr", "power")

    def mutate(self, node, index):
        from parso.python.tree import Keyword

        if self._is_sum(node):
            del node.children[-2:]
        else:
            first = node.get_first_leaf()
            node.children[0] = Keyword("pass", first.start_pos, first.prefix)
        return node


@functools.cache
def operators() -> dict:
    """All operators by name."""
    from cosmic_ray import plugins

    found = {name: plugins.get_operator(name)() for name in plugins.operator_names() if PLAUSIBLE.fullmatch(name)}
    return {**found, "LeaveOut": LeaveOut()}


def candidates(source: str) -> Iterator[tuple[int, str, int]]:
    """Every mutant of a file: its line, the operator, and which occurrence of it."""
    from cosmic_ray.ast import ast_nodes, get_ast

    nodes = list(ast_nodes(get_ast(source)))
    for name, operator in operators().items():
        positions = [(node, start[0]) for node in nodes for start, _ in operator.mutation_positions(node)]
        for occurrence, (node, line) in enumerate(positions):
            if not _is_words(node):
                yield line, name, occurrence


def _is_words(node) -> bool:
    """Parts of an error's message, and the bare star of a signature, which cosmic-ray takes for a product."""
    if node.parent is not None and node.parent.type == "parameters":
        return True
    while node is not None and node.type not in ("raise_stmt", "fstring"):
        node = node.parent
    return node is not None


def chosen(source: str, number: int, seed: int) -> list[tuple[int, str, int]]:
    """A random choice that repeats, at most one mutant a line."""
    found = list(candidates(source))
    random.Random(seed).shuffle(found)
    lines: dict[int, tuple[int, str, int]] = {}
    for line, name, occurrence in found:
        if len(lines) < number and line not in lines and _compiles(source, name, occurrence):
            lines[line] = (line, name, occurrence)
    return sorted(lines.values())


def _compiles(source: str, name: str, occurrence: int) -> bool:
    from cosmic_ray.mutating import mutate_code

    try:
        compile(mutate_code(source, operators()[name], occurrence), "mutant", "exec")
    except SyntaxError:
        return False
    return True


def run(file: str, seconds: int) -> tuple[str, float]:
    """The tests of a file in a fork: ``"survived"``, ``"timeout"`` or what failed first; and the processor seconds."""
    modules, expression = TESTS[file]
    expression = f"({expression}) and not icosahedral"  # seconds to build
    pid = os.fork()
    if not pid:
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        code = 3
        try:
            with open("log", "w") as stream:
                os.dup2(stream.fileno(), 1)
                os.dup2(stream.fileno(), 2)
            import pytest

            paths = [f"tests/test_{module}.py" for module in modules.split()]
            code = pytest.main(
                ["-xq", "-p", "no:cacheprovider", "--tb=short", "--durations=5", "-k", expression, *paths]
            )
        finally:
            sys.stdout.flush()
            os._exit(int(code))
    _, status, usage = os.wait4(pid, 0)
    spent = usage.ru_utime + usage.ru_stime
    if status == 0:
        return "survived", spent
    if os.WIFSIGNALED(status):
        return "timeout", spent
    words = re.findall(r"^(?:FAILED|ERROR) (\S+)", pathlib.Path("log").read_text(errors="replace"), re.MULTILINE)
    return words[0].removeprefix("tests/") if words else f"status {status}", spent


def _write(path: pathlib.Path, text: str) -> None:
    path.write_text(text)
    # A mutant may have the size and the time of the code before it, by which Python knows compiled code.
    for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*"):
        compiled.unlink()


def plant(file: str, number: int, seed: int, factor: float, lines: list[int] | None) -> tuple[int, int]:
    """Mutants of a file one after the other: how many were caught, and how many there were."""
    from cosmic_ray.mutating import mutate_code

    path = pathlib.Path("pyro_equiflow", file)
    source = path.read_text()
    outcome, seconds = run(file, 3600)
    log = pathlib.Path("log").read_text()
    if outcome != "survived":
        sys.exit(f"{file}: unchanged code fails, {outcome}\n{log}")
    print(*log.splitlines()[-8:], f"{file}: {seconds:.1f} s", sep="\n", flush=True)
    mutants = chosen(source, number, seed) if not lines else sorted(m for m in candidates(source) if m[0] in lines)
    caught = 0
    for line, name, occurrence in mutants:
        mutant = mutate_code(source, operators()[name], occurrence)
        _write(path, mutant)
        outcome, spent = run(file, int(10 + factor * seconds))
        _write(path, source)
        caught += outcome != "survived"
        print(f"  {file}:{line} {name.removeprefix('core/')} {occurrence}: {outcome} ({spent:.1f} s)", flush=True)
        if outcome == "survived":
            changes = difflib.unified_diff(source.splitlines(), mutant.splitlines(), lineterm="", n=0)
            print("\n".join("    " + text for text in list(changes)[3:]), flush=True)
    return caught, len(mutants)


def _preload() -> None:
    """Loads all but the package itself, and keeps the garbage collector of the forks from looking through it."""
    for name in ("escnn.gspaces", "escnn.nn", "pyro.infer.autoguide", "scipy.linalg", "torch._dynamo"):
        importlib.import_module(name)
    with tempfile.TemporaryDirectory() as empty, contextlib.redirect_stdout(io.StringIO()):
        importlib.import_module("pytest").main(["-p", "no:cacheprovider", "-c", os.devnull, empty])
    gc.collect()
    gc.freeze()


def main() -> None:
    """Reads the arguments, copies the tree, and prints what survives."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="such as maps/affine.py; all by default")
    parser.add_argument("--per-file", type=int, default=8, help="mutants of each file")
    parser.add_argument("--seed", type=int, default=0, help="of the choice")
    parser.add_argument("--factor", type=float, default=4.0, help="how much longer than unchanged code one may take")
    parser.add_argument("--lines", type=int, nargs="*", help="all mutants of these lines in place of a choice")
    arguments = parser.parse_args()
    root = pathlib.Path(__file__).resolve().parents[1]
    with tempfile.TemporaryDirectory() as folder:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, check=True).stdout
        archive = subprocess.run(["tar", "c", "--null", "-T", "-"], cwd=root, input=listed, stdout=-1, check=True)
        subprocess.run(["tar", "x"], cwd=folder, input=archive.stdout, check=True)
        os.chdir(folder)
        sys.path[0] = folder
        _preload()
        counts: collections.Counter = collections.Counter()
        for file in arguments.files or TESTS:
            options = (arguments.per_file, arguments.seed, arguments.factor, arguments.lines)
            caught, number = plant(file, *options)
            counts.update(caught=caught, number=number)
            print(f"{file}: {caught} of {number} caught", flush=True)
        print(f"all: {counts['caught']} of {counts['number']} caught")
        os.chdir(root)


if __name__ == "__main__":
    main()
