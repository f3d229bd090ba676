"use strict";
const $ = (id) => document.getElementById(id);
const images = JSON.parse($("images").textContent);

// An image is decoded when it comes near, so that a page of thousands opens at once.
const near = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (entry.isIntersecting) {
      entry.target.src = images[entry.target.dataset.image];
      near.unobserve(entry.target);
    }
  }
}, { rootMargin: "400px" });
const watch = (part) => part.querySelectorAll("img[data-image]").forEach((image) => near.observe(image));
watch(document);

const list = $("cases");
if (list) {
  // What a case's line opens to is laid out when it is first opened.
  const open = (details) => {
    const inside = details.querySelector("template");
    if (inside) {
      inside.replaceWith(inside.content);
      watch(details);
    }
  };
  list.addEventListener("toggle", (event) => open(event.target), true);

  const text = (item) => {
    const inside = item.querySelector("template");
    return `${item.textContent} ${inside ? inside.content.textContent : ""}`.toLowerCase();
  };
  const cases = [...list.children].map((item) => ({
    item,
    keys: JSON.parse(item.dataset.keys),
    tags: JSON.parse(item.dataset.tags),
    text: null,
  }));

  const filter = () => {
    const tag = $("filter").value;
    const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const one of cases) {
      let fits = !tag || one.tags.includes(tag);
      if (fits && words.length) {
        one.text ??= text(one.item);
        fits = words.every((word) => one.text.includes(word));
      }
      one.item.hidden = !fits;
      shown += fits;
    }
    $("count").textContent = `${shown} of ${cases.length} cases`;
  };

  const sort = () => {
    const key = $("sort").value;
    const sign = $("down").checked ? -1 : 1;
    // Cases without the number come last, whichever way it is sorted.
    cases.sort((a, b) => {
      const [has, had] = [key in a.keys, key in b.keys];
      if (has && had && a.keys[key] !== b.keys[key]) return sign * (a.keys[key] - b.keys[key]);
      return had - has || a.keys.order - b.keys.order;
    });
    list.append(...cases.map((one) => one.item));
  };

  $("filter").addEventListener("change", filter);
  $("search").addEventListener("input", filter);
  $("sort").addEventListener("change", sort);
  $("down").addEventListener("change", sort);
  $("filter").form.addEventListener("submit", (event) => event.preventDefault());
}
