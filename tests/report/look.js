"use strict";
// What a person sees of a report: sections, pictures, labels that touch, tables, and what a click on a heading does.
(() => {
  const box = (element) => element.getBoundingClientRect();
  const visible = (rect) => rect.width > 0 && rect.height > 0;
  const overlap = (a, b) =>
    Math.min(a.right, b.right) - Math.max(a.left, b.left) > 0.5 && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1.5;
  const plots = [...document.querySelectorAll("figure")].map((figure) => {
    const svg = figure.querySelector("svg");
    const texts = [...svg.querySelectorAll("text")].map((text) => ({ text: text.textContent.trim(), rect: box(text) }));
    const touching = [];
    const outside = [];
    texts.forEach((one, index) => {
      const frame = box(svg);
      if (one.rect.left < frame.left - 1 || one.rect.right > frame.right + 1 || one.rect.top < frame.top - 1 || one.rect.bottom > frame.bottom + 1) outside.push(one.text);
      for (const other of texts.slice(index + 1)) if (overlap(one.rect, other.rect)) touching.push([one.text, other.text]);
    });
    const label = svg.querySelector("text");
    return { id: figure.id, visible: visible(box(svg)), texts: texts.map((one) => one.text), touching, outside, ink: getComputedStyle(label).fill, box: [box(svg).left, box(svg).top + scrollY, box(svg).width, box(svg).height].map(Math.round) };
  });
  const cells = (table, column) => [...table.tBodies[0].rows].map((row) => row.cells[column].textContent);
  const tables = {};
  for (const table of document.querySelectorAll("table")) {
    const heads = [...table.querySelectorAll("th")];
    tables[table.id] = heads.map((head, column) => {
      const before = cells(table, column);
      head.querySelector("button").click();
      const up = cells(table, column);
      const ascending = head.getAttribute("aria-sort");
      head.querySelector("button").click();
      return { title: head.textContent, numeric: head.classList.contains("number"), before, up, down: cells(table, column), ascending, descending: head.getAttribute("aria-sort") };
    });
    heads[0].querySelector("button").click();
  }
  const ids = [...document.querySelectorAll("[id]")].map((element) => element.id);
  const style = getComputedStyle(document.body);
  return JSON.stringify({
    title: document.title,
    sections: [...document.querySelectorAll("section")].map((section) => ({ id: section.id, visible: visible(box(section)), words: section.textContent.trim().length })),
    plots,
    tables,
    repeated: ids.filter((id, index) => ids.indexOf(id) !== index),
    dangling: [...document.querySelectorAll("nav a")].map((link) => link.hash.slice(1)).filter((id) => !document.getElementById(id)),
    paper: style.backgroundColor,
    ink: style.color,
    wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    height: Math.ceil(document.querySelector("footer").getBoundingClientRect().bottom + scrollY + 24),
  });
})();
