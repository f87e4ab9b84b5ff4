"""A run as JUnit XML, which CI services show: one test suite a tier, and one for the session itself.

Whatever the report fails for, some test case here fails for, so that a CI service that reads only this file never
shows green for it.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

from drydock.report.documents import Report, Test, Tier


def junit(report: Report) -> bytes:
    """The XML file of a run."""
    root = ElementTree.Element("testsuites", name=report.session, time=f"{report.seconds:.3f}")
    for tier in report.tiers:
        _tier_suite(root, report, tier)
    _session_suite(root, report)
    for attribute in ("tests", "failures", "errors", "skipped"):
        root.set(attribute, str(sum(int(suite.get(attribute, 0)) for suite in root)))
    ElementTree.indent(root)
    text: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return text


def _suite(root: ElementTree.Element, report: Report, name: str, seconds: float) -> ElementTree.Element:
    suite = ElementTree.SubElement(root, "testsuite", name=name, time=f"{seconds:.3f}")
    properties = ElementTree.SubElement(suite, "properties")
    verdict: str = report.verification.verdict if report.verification else "not run"
    if report.drift:
        verdict += ", allowed"
    for key, value in (
        ("session", report.session),
        ("profile", report.profile),
        ("image", report.image.name),
        ("image.digest", report.image.digest or "not known"),
        ("versions", verdict),
        ("drydock.commit", report.drydock.text),
        ("device", report.device.text),
    ):
        ElementTree.SubElement(properties, "property", name=key, value=value)
    return suite


def _count(suite: ElementTree.Element) -> None:
    cases = suite.findall("testcase")
    suite.set("tests", str(len(cases)))
    for attribute, element in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        suite.set(attribute, str(sum(case.find(element) is not None for case in cases)))


def _case(suite: ElementTree.Element, classname: str, name: str, seconds: float = 0.0) -> ElementTree.Element:
    return ElementTree.SubElement(
        suite, "testcase", classname=classname, name=name, time=f"{seconds:.3f}"
    )  # fmt: skip


def _names(identifier: str) -> tuple[str, str]:
    """pytest's own split: `tests/a/test_b.py::C::test_d[x::y]` is `tests.a.test_b.C` and `test_d[x::y]`."""
    plain, bracket, parameters = identifier.partition("[")
    path, *names = plain.split("::")
    *classes, name = names or [path]
    return ".".join([path.removesuffix(".py").replace("/", "."), *classes]), name + bracket + parameters


def _problem(case: ElementTree.Element, kind: str, message: str, text: str) -> None:
    element = ElementTree.SubElement(case, "error" if kind == "error" else "failure", type=kind)
    element.set("message", message)
    element.text = text


def _test_case(suite: ElementTree.Element, test: Test) -> None:
    case = _case(suite, *_names(test.id), test.seconds)
    if test.outcome != "passed":
        where = f"in its {test.phase} phase" if test.phase else ""
        stacks = f"stacks of its processes: {test.stacks}" if test.stacks else ""
        _problem(
            case,
            test.outcome,
            test.message or f"{test.outcome} {where}".strip(),
            "\n".join(line for line in (where, stacks, test.detail) if line),
        )


def _tier_suite(root: ElementTree.Element, report: Report, tier: Tier) -> None:
    suite = _suite(root, report, tier.tier, tier.seconds)
    suite.set("timestamp", (tier.began or report.began).isoformat())
    for test in tier.tests:
        _test_case(suite, test)
    for absent in tier.not_selected:
        case = _case(suite, *_names(absent.id))
        ElementTree.SubElement(case, "skipped", message=f"not selected: {absent.reason}")
    if not tier.ok and all(test.outcome == "passed" for test in tier.tests):
        # What failed is no test: the tier's budget, its pytest, its watchdog.
        _problem(_case(suite, f"tests.{tier.tier}", "tier", tier.seconds), tier.outcome, tier.why, tier.why)
    _count(suite)


def _session_suite(root: ElementTree.Element, report: Report) -> None:
    suite = _suite(root, report, "session", max(report.overhead_seconds, 0.0))
    suite.set("timestamp", report.began.isoformat())
    if report.verification:
        case = _case(suite, "session", "verification")
        differences = [
            f"{check.name}: {finding.subject}: {finding.what}"
            for check in report.verification.checks
            for finding in check.findings
        ]
        if report.drifted:
            _problem(case, "drift", report.verification.sentence, "\n".join(differences))
    for absent in report.not_run:
        case = _case(suite, "session", absent.what)
        ElementTree.SubElement(case, "skipped", message=f"not run: {absent.reason}")
    if not report.ok and root.find(".//failure") is None and root.find(".//error") is None:
        _problem(_case(suite, "session", "session", report.seconds), "failed", report.verdict, report.detail)
    _count(suite)
