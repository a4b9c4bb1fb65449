"""Checks pages of `hvd-vgg report` and its like in a browser: what they load, how they fit, and whom they leave out.

    python -m venv BROWSER && BROWSER/bin/pip install playwright axe-playwright-python
    BROWSER/bin/python tests/reference/check_pages.py PAGE.html ... [--out=FOLDER] [--chromium=/usr/bin/chromium]

Outside the test command: needs Chromium 111 or newer (Debian: `apt-get install chromium`) and those two packages, which
nothing else here uses. Each page is opened at widths of 360, 768 and 1280 pixels, light and dark, and as it is printed on
A4; each time first as it opens, then with all that can be opened or chosen. It fails, with exit code 1, on

- a message on the console that is an error or a warning, or any request but for the file itself and `data:`;
- a page wider than the screen, or a text of a figure that is cut off or covers another one;
- what axe-core finds against WCAG 2.0 to 2.2, levels A and AA, contrast of text among it;
- what can be focused and is not reached by Tab, in the order of the page, or whose focus cannot be seen; a choice that the
  arrow keys do not make, or a summary that Enter does not open.

--out: keeps a picture of each, NAME-WIDTH-SCHEME.png and NAME-print.pdf.
"""

import argparse
import sys
from pathlib import Path

WIDTHS, HEIGHT, PAPER = (360, 768, 1280), 900, 718  # pixels; PAPER: of A4 between margins of 1 cm
SCHEMES = ("light", "dark")
WCAG = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]
MOST = 400  # presses of Tab after which the focus is taken to go in a circle

# What Tab should reach, in the order of the page: of a group of radio buttons, the chosen one.
FOCUSABLE = """() => {
  const all = document.querySelectorAll('a[href], button, input, select, textarea, summary, [tabindex]');
  window.focusable = [...all].filter(e => e.checkVisibility() && e.tabIndex >= 0 && !e.disabled
    && !(e.type === 'radio' && !e.checked));
  return window.focusable.map(e =>
    `<${e.localName}> ${e.getAttribute('aria-label') || e.textContent.trim() || e.id}`.slice(0, 60));
}"""
FOCUSED = "() => document.activeElement === document.body ? -2 : window.focusable.indexOf(document.activeElement)"
# The part of the page around what has the focus, its label among it.
AREA = """() => {
  const e = document.activeElement, boxes = [e, ...(e.labels || [])].map(each => each.getBoundingClientRect());
  const left = Math.min(...boxes.map(b => b.left)) - 6, top = Math.min(...boxes.map(b => b.top)) - 6;
  const right = Math.max(...boxes.map(b => b.right)) + 6, bottom = Math.max(...boxes.map(b => b.bottom)) + 6;
  const x = Math.max(0, left), y = Math.max(0, top);
  return {x, y, width: Math.max(1, Math.min(innerWidth, right) - x), height: Math.max(1, Math.min(innerHeight, bottom) - y)};
}"""
OVERFLOW = """() => {
  const wide = document.documentElement.scrollWidth - innerWidth;
  const within = e => e.parentElement && (e.parentElement.closest('.scroll, svg') !== null);
  const out = [...document.querySelectorAll('body *')].filter(e => e.checkVisibility() && !within(e)
    && e.getBoundingClientRect().right > innerWidth + 0.5 && e.scrollWidth > 0);
  return wide > 0 ? [wide, out.slice(0, 3).map(e => `<${e.localName} class="${e.className}">`)] : null;
}"""
FIGURES = """() => {
  const found = [];
  for (const svg of document.querySelectorAll('svg')) {
    if (!svg.checkVisibility()) continue;
    const frame = svg.getBoundingClientRect(), texts = [...svg.querySelectorAll('text')].filter(e => e.textContent.trim());
    const boxes = texts.map(e => e.getBoundingClientRect()), name = svg.parentElement.getAttribute('aria-label');
    boxes.forEach((a, i) => {
      if (a.left < frame.left - 1 || a.right > frame.right + 1 || a.top < frame.top - 1 || a.bottom > frame.bottom + 1)
        found.push(`${name}: ${texts[i].textContent.trim()} is cut off`);
      boxes.slice(i + 1).forEach((b, j) => {
        const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
        const down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
        if (across > 1 && down > 3)
          found.push(`${name}: ${texts[i].textContent.trim()} and ${texts[i + 1 + j].textContent.trim()} overlap`);
      });
    });
  }
  return found;
}"""
OPEN_ALL = """() => {
  document.querySelectorAll('details').forEach(e => { e.open = true; });
  const groups = new Set([...document.querySelectorAll('input[type=radio]')].map(e => e.name));
  groups.forEach(name => { [...document.querySelectorAll(`input[name="${name}"]`)].pop().checked = true; });
}"""


def check_layout(page, axe):
    """Yields what is wrong with a page as it is shown now, but for its use by keyboard."""
    overflow = page.evaluate(OVERFLOW)
    if overflow:
        yield f"wider than the screen by {overflow[0]} pixels: {', '.join(overflow[1])}"
    yield from page.evaluate(FIGURES)
    found = axe.run(page, options={"runOnly": {"type": "tag", "values": WCAG}}).response
    for violation in found["violations"]:
        where = "; ".join(" ".join(node["target"]) for node in violation["nodes"][:3])
        why = violation["nodes"][0]["failureSummary"].splitlines()[-1].strip()
        yield f"axe {violation['id']} at {len(violation['nodes'])} places: {where}: {why}"


def check_focus(page):
    """Yields what Tab does not reach in order, or whose focus cannot be seen."""
    page.evaluate("() => { document.activeElement.blur(); scrollTo(0, 0); }")
    page.mouse.click(1, 1)  # where the next Tab begins: at the top
    names, order = page.evaluate(FOCUSABLE), []
    while len(order) < MOST:
        page.keyboard.press("Tab")
        index = page.evaluate(FOCUSED)
        if index == -2 or index in order:
            break
        order.append(index)
        if index < 0:
            yield f"Tab reaches what should not take it: {page.evaluate('() => document.activeElement.outerHTML')[:80]}"
            continue
        area = page.evaluate(AREA)
        focused = page.screenshot(clip=area, animations="disabled")
        page.evaluate("() => { window.last = document.activeElement; last.blur(); }")
        plain = page.screenshot(clip=area, animations="disabled")
        if focused == plain:
            yield f"the focus cannot be seen: {names[index]}"
        page.evaluate("() => window.last.focus({preventScroll: true})")
    reached = [index for index in order if index >= 0]
    yield from (f"Tab does not reach {name}" for index, name in enumerate(names) if index not in reached)
    if reached != sorted(reached):
        yield f"Tab goes in another order than the page: {[names[index] for index in reached]}"


def check_controls(page):
    """Yields the controls that keys do not operate; leaves all of them as they were opened first."""
    for radio in page.locator("input[type=radio]:checked").all():
        count = page.locator(f'input[name="{radio.get_attribute("name")}"]').count()
        chosen = set()
        radio.focus()
        for _ in range(count):
            page.keyboard.press("ArrowRight")
            chosen.add(page.evaluate("() => document.activeElement.checked ? document.activeElement.id : ''"))
        if len(chosen - {""}) < count:
            yield f"the arrow keys choose {sorted(chosen)} of {count} buttons"
    for summary in page.locator("summary:visible").all():
        summary.focus()
        page.keyboard.press("Enter")
        if not summary.evaluate("e => e.parentElement.open"):
            yield f"Enter does not open {summary.text_content()}"
        page.keyboard.press("Enter")


def check_page(browser, axe, path, width, scheme, out):
    """Yields what is wrong with a page at a width and in a scheme; scheme `print`: as on paper."""
    paper = scheme == "print"
    context = browser.new_context(
        viewport={"width": width, "height": HEIGHT}, color_scheme="light" if paper else scheme, reduced_motion="reduce"
    )
    page, address, faults = context.new_page(), path.resolve().as_uri(), []
    page.on("console", lambda line: faults.append(f"console: {line.text}") if line.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: faults.append(f"script: {error}"))
    page.on(
        "request",
        lambda each: faults.append(f"request: {each.url[:120]}") if not each.url.startswith((address, "data:")) else None,
    )
    page.goto(address)
    if paper:
        page.emulate_media(media="print")
    found = [*check_layout(page, axe), *([] if paper else [*check_focus(page), *check_controls(page)])]
    yield from found
    if out and paper:
        page.pdf(path=out / f"{path.stem}-print.pdf", format="A4", print_background=False)
    elif out:
        page.evaluate("() => { document.activeElement.blur(); scrollTo(0, 0); }")
        page.screenshot(path=out / f"{path.stem}-{width}-{scheme}.png", full_page=True)
    page.evaluate(OPEN_ALL)
    opened = [*check_layout(page, axe), *([] if paper else check_focus(page))]
    yield from (f"all opened: {fault}" for fault in opened if fault not in found)
    yield from faults
    context.close()


def main():
    """Checks the pages; prints a line for each way to look at one, and what is wrong below it."""
    from axe_playwright_python.sync_playwright import Axe
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="+", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    options = parser.parse_args()
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
    ways = [(width, scheme) for width in WIDTHS for scheme in SCHEMES] + [(PAPER, "print")]
    count = 0
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=options.chromium, args=["--no-sandbox", "--disable-gpu"])
        for path in options.pages:
            for width, scheme in ways:
                faults = list(dict.fromkeys(check_page(browser, Axe(), path, width, scheme, options.out)))
                print(f"{path} {width} {scheme}: {'good' if not faults else f'{len(faults)} faults'}", flush=True)
                for fault in faults:
                    print(f"    {fault}")
                count += len(faults)
        browser.close()
    sys.exit(1 if count else 0)


if __name__ == "__main__":
    main()
