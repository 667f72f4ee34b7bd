// A table of any length: only the rows in sight are in the page.  Search, filters, sorting, and keys as in a grid.
"use strict";

Page.table = (() => {
  const { el, announce, count, countOf } = Page;
  const rowHeight = 30; // pixels, as in page.css
  const tallest = 12e6; // pixels: browsers have none above some 16 million
  const aroundSight = 12; // rows
  const mostPrinted = 1000; // rows

  // What sorts layer10 after layer2.
  const natural = (text) => text.toLowerCase().replace(/\d+/g, (digits) => digits.padStart(12, "0"));

  // A test of texts: a part of them, or with wildcards the whole, as `--filter` has it; case counts where capitals are typed.
  function matcher(query) {
    if (!query) return null;
    const fold = query === query.toLowerCase();
    if (!/[*?]/.test(query)) return fold ? (text, lower) => lower.includes(query) : (text) => text.includes(query);
    const source = query.replace(/[.+^${}()|[\]\\]/g, "\\$&").replace(/\*+/g, "[^]*").replace(/\?/g, "[^]");
    const pattern = new RegExp(`^${source}$`, fold ? "i" : "");
    return (text) => pattern.test(text);
  }

  // The places in order of a column's keys; what has none (null, NaN) is last either way, and of equals the order stays.
  function sorted(places, column, isDown) {
    const keys = new Map();
    for (const i of places) {
      const key = column.key(i);
      keys.set(i, key === undefined || Number.isNaN(key) ? null : typeof key === "string" ? natural(key) : key);
    }
    const way = isDown ? -1 : 1;
    return places.sort((a, b) => {
      const x = keys.get(a), y = keys.get(b);
      if (x === y) return a - b;
      if (x === null || y === null) return x === null ? 1 : -1;
      return x < y ? -way : x > y ? way : a - b;
    });
  }

  // columns: [{name, show(i) -> text or node, key(i) -> what sorts it, number, width (pixels; none: the rest),
  // bad(i), hint}]; search(i) -> text; filters: [{label, value(i) -> text}]; open(i) when a row is chosen, close() when none
  // is any more; order: places in the order to begin with.
  return function table(body, { label, thing, columns, total, search, placeholder, filters = [], open, close, height = 520 }) {
    const known = { texts: null, lower: null };
    let query = "", sort = null, isDown = false, shown = [], active = 0, chosen = null, first = -1, last = -1, isPrinting = false;
    const wanted = filters.map(() => "");

    const tools = el("div", { class: "tools" });
    const said = el("span", { class: "count" });
    const field = search && el("input", { type: "search", "aria-label": `Search ${label}`,
      placeholder: placeholder || "Search: part of a name, or a pattern such as *.bias", spellcheck: "false", autocomplete: "off",
      oninput: () => { query = field.value.trim(); update(); },
      onkeydown: (event) => {
        if (event.key === "ArrowDown" && shown.length) { event.preventDefault(); focusRow(0); }
        if (event.key === "Escape") { field.value = query = ""; update(); }
      } });
    if (field) tools.append(el("div", { class: "grow" }, field));
    filters.forEach((filter, n) => {
      const counts = new Map();
      for (let i = 0; i < total; i++) counts.set(filter.value(i), (counts.get(filter.value(i)) || 0) + 1);
      if (counts.size < 2) return;
      const values = [...counts].sort((a, b) => b[1] - a[1]).slice(0, 500);
      tools.append(el("label", {}, filter.label, el("select", { onchange: (event) => { wanted[n] = event.target.value; update(); } },
        el("option", { value: "" }, "all"),
        values.map(([value, number]) => el("option", { value: `=${value}` }, `${Page.cut(value || "(none)", 60)} (${count(number)})`)))));
    });
    const hasTools = tools.childElementCount > 0;
    tools.append(said);

    const heads = columns.map((column, n) => el("th", { scope: "col", class: column.number && "number", title: column.hint },
      column.key ? el("button", { type: "button", onclick: () => {
        if (sort === n && isDown === Boolean(column.number)) isDown = !isDown;
        else if (sort === n) sort = null;
        else { sort = n; isDown = Boolean(column.number); }
        update();
      } }, column.name) : el("span", {}, column.name || "")));
    const above = el("tr", { class: "gap", "aria-hidden": "true" }, el("td", { colspan: columns.length }));
    const below = above.cloneNode(true);
    const rows = el("tbody", {}, above, below);
    const least = columns.reduce((sum, column) => sum + (column.width || 240), 0);
    const grid = el("table", { class: "fixed", role: open && "grid", "aria-label": label, style: { minWidth: `${least}px` } },
      el("colgroup", {}, columns.map((column) => el("col", { style: column.width ? { width: `${column.width}px` } : {} }))),
      el("thead", {}, el("tr", {}, heads)), rows);
    const scroll = el("div", { class: "scroll", style: { maxHeight: `${height}px` }, onscroll: () => draw() }, grid);
    const none = el("p", { class: "none", hidden: true }, `No ${thing} matches.`);
    body.append(...(hasTools ? [tools] : []), scroll, none);
    rows.addEventListener("click", (event) => {
      const at = placeOf(event.target);
      if (at !== null) { active = at; choose(at); }
    });
    rows.addEventListener("keydown", onkey);
    for (const [name, value] of [["beforeprint", true], ["afterprint", false]])
      addEventListener(name, () => { isPrinting = value; if (body.isConnected) draw(true); });

    function update() {
      const test = matcher(query);
      if (test && !known.texts) {
        known.texts = Array.from({ length: total }, (_, i) => search(i));
        known.lower = known.texts.map((text) => text.toLowerCase());
      }
      shown = [];
      next: for (let i = 0; i < total; i++) {
        if (test && !test(known.texts[i], known.lower[i])) continue;
        for (let n = 0; n < filters.length; n++) if (wanted[n] && `=${filters[n].value(i)}` !== wanted[n]) continue next;
        shown.push(i);
      }
      if (sort !== null) shown = sorted(shown, columns[sort], isDown);
      heads.forEach((head, n) => {
        if (!columns[n].key) return;
        head.setAttribute("aria-sort", sort !== n ? "none" : isDown ? "descending" : "ascending");
      });
      const text = shown.length === total ? countOf(total, thing) : `${count(shown.length)} of ${countOf(total, thing)}`;
      if (said.textContent && said.textContent !== text) announce(text);
      said.textContent = text;
      none.hidden = shown.length > 0;
      scroll.hidden = !shown.length;
      grid.setAttribute("aria-rowcount", String(shown.length + 1));
      active = 0;
      scroll.scrollTop = 0;
      draw(true);
    }

    // How many characters of names, which are cut in the middle, each column has room for.
    let room = [];
    function measure() {
      const cell = el("td", { class: "mono" }, el("span", {}, "0".repeat(20)));
      rows.prepend(el("tr", {}, cell));
      const character = cell.firstChild.getBoundingClientRect().width / 20 || 7;
      cell.parentNode.remove();
      room = heads.map((head) => Math.max(8, Math.floor((head.clientWidth - 24) / character)));
    }
    new ResizeObserver(() => { if (body.isConnected) draw(true); }).observe(scroll);

    // The rows in sight, between two gaps as tall as those that are not.
    function draw(again) {
      const full = shown.length * rowHeight;
      const ratio = Math.max(1, full / tallest);
      const inSight = Math.ceil(height / rowHeight);
      let from = Math.max(0, Math.floor((scroll.scrollTop * ratio) / rowHeight) - aroundSight);
      let to = Math.min(shown.length, from + inSight + 2 * aroundSight);
      if (isPrinting) [from, to] = [0, Math.min(shown.length, mostPrinted)];
      if (!again && from === first && to === last) return;
      [first, last] = [from, to];
      if (again) measure();
      const made = [];
      for (let at = from; at < to; at++) made.push(row(at));
      above.firstChild.style.height = `${(from * rowHeight) / ratio}px`;
      below.firstChild.style.height = isPrinting ? "0" : `${Math.max(0, full / ratio - (from * rowHeight) / ratio - (to - from) * rowHeight)}px`;
      const hadFocus = rows.contains(document.activeElement);
      rows.replaceChildren(above, ...made, below);
      if (hadFocus) (rowAt(active) || scroll).focus({ preventScroll: true });
    }

    function row(at) {
      const i = shown[at];
      return el("tr", { tabindex: open ? (at === active ? "0" : "-1") : null, "aria-rowindex": String(at + 2), "data-at": String(at),
        "aria-selected": open ? String(i === chosen) : null },
      columns.map((column, n) => {
        const value = column.show(i), fits = column.mono ? room[n] : 300;
        return el("td", { class: [column.number && "number", column.mono && "mono", column.bad && column.bad(i) && "bad"].filter(Boolean).join(" ") || null,
          title: typeof value === "string" && value.length > Math.min(fits, 16) ? Page.cut(value, 500) : null }, typeof value === "string" ? Page.cut(value, fits) : value);
      }));
    }

    const rowAt = (at) => rows.querySelector(`tr[data-at="${at}"]`);
    function placeOf(node) {
      const found = node.closest("tr[data-at]");
      return found ? Number(found.dataset.at) : null;
    }
    function focusRow(at) {
      at = Math.max(0, Math.min(shown.length - 1, at));
      const ratio = Math.max(1, (shown.length * rowHeight) / tallest);
      const top = (at * rowHeight) / ratio, room = scroll.clientHeight - 2 * rowHeight;
      if (top < scroll.scrollTop) scroll.scrollTop = top;
      else if (top > scroll.scrollTop + room) scroll.scrollTop = top - room;
      active = at;
      draw(true);
      const found = rowAt(at);
      if (found) found.focus({ preventScroll: true });
    }
    function choose(at) {
      if (!open) return;
      chosen = shown[at];
      draw(true);
      open(chosen);
    }
    function onkey(event) {
      const page = Math.max(1, Math.floor(scroll.clientHeight / rowHeight) - 2);
      const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity };
      if (event.key in steps) {
        if (event.key === "ArrowUp" && active === 0 && field) field.focus();
        else focusRow(active + steps[event.key]);
      } else if (event.key === "Enter" || event.key === " ") choose(active);
      else if (event.key === "Escape") { chosen = null; draw(true); if (close) close(); }
      else return;
      event.preventDefault();
    }

    update();
    return {
      // Search for a text, as if it were typed.
      find(text) { field.value = query = text; update(); },
      // Show and choose a row by its place among all.
      reveal(i) {
        if (!shown.includes(i)) { wanted.fill(""); tools.querySelectorAll("select").forEach((each) => { each.value = ""; }); this.find(""); }
        const at = shown.indexOf(i);
        focusRow(at);
        choose(at);
      },
      choose,
      focus: () => focusRow(active),
    };
  };
})();
