"use strict";
// Pictures for the next message, and the boxes of replies. Pictures stay in the page as data: addresses.

const attached = []; // data: addresses of the pictures for the next message
let latest = null; // the picture that was shown last

function showAttached() {
  at("attached").replaceChildren();
  attached.forEach((url, index) => {
    const button = add(at("attached"), "button", "thumbnail");
    button.type = "button";
    button.setAttribute("aria-label", `Remove picture ${index + 1}`);
    add(button, "img", "").src = url;
    button.addEventListener("click", () => {
      attached.splice(index, 1);
      showAttached();
    });
  });
}

function readPicture(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

async function attach(files) {
  for (const file of files) if (file.type.startsWith("image/")) attached.push(await readPicture(file));
  showAttached();
}

// The content of a message with the attached pictures before its text, which are then shown in its turn.
function contentOf(text) {
  if (!attached.length) return text;
  const parts = attached.map((url) => ({ type: "image_url", image_url: { url } }));
  attached.length = 0;
  showAttached();
  return [...parts, { type: "text", text }];
}

function showPictures(box, content) {
  if (typeof content === "string") return;
  for (const part of content) {
    if (part.type !== "image_url") continue;
    latest = part.image_url.url;
    add(box, "img", "picture").src = latest;
  }
}

// Gives pictures and text of a message back to the person.
function takeBack(content) {
  if (typeof content === "string") return content;
  attached.push(...content.filter((part) => part.type === "image_url").map((part) => part.image_url.url));
  showAttached();
  return content.at(-1).text;
}

const COLORS = ["#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442"];

// The boxes of a text: label and four numbers in thousandths of width and height.
function boxesIn(text) {
  let label = "";
  const found = [];
  for (const [, tag, inner] of text.matchAll(/<(ref|box)>([^]*?)<\/\1>/g)) {
    if (tag === "ref") {
      label = inner.trim();
      continue;
    }
    const corners = inner.match(/^\s*\((\d+),\s*(\d+)\),\s*\((\d+),\s*(\d+)\)\s*$/)?.slice(1).map(Number);
    if (corners?.every((number) => number < 1000)) found.push({ label, corners });
  }
  return found;
}

function drawBoxes(box, text) {
  const found = boxesIn(text);
  if (!found.length || !latest) return;
  const canvas = add(box, "canvas", "picture");
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `Boxes: ${found.map((one) => one.label || "no label").join(", ")}`);
  const image = new Image();
  image.onload = () => {
    canvas.width = image.naturalWidth;
    canvas.height = image.naturalHeight;
    const pen = canvas.getContext("2d");
    const size = Math.max(10, Math.min(canvas.width, canvas.height) / 24);
    const labels = [...new Set(found.map((one) => one.label))];
    pen.drawImage(image, 0, 0);
    pen.lineWidth = Math.max(1, size / 6);
    pen.font = `${size}px sans-serif`;
    for (const { label, corners } of found) {
      const [left, top, right, bottom] = corners.map((number, at) => (number * (at % 2 ? canvas.height : canvas.width)) / 1000);
      pen.strokeStyle = pen.fillStyle = COLORS[labels.indexOf(label) % COLORS.length];
      pen.strokeRect(left, top, right - left, bottom - top);
      if (!label) continue;
      const above = top >= 1.3 * size ? top - 1.3 * size : top;
      pen.fillRect(left, above, pen.measureText(label).width + size / 2, 1.3 * size);
      pen.fillStyle = "white";
      pen.fillText(label, left + size / 4, above + size);
    }
    conversation.scrollTop = conversation.scrollHeight;
  };
  image.src = latest;
}

at("attach").addEventListener("click", () => at("pictures").click());
at("pictures").addEventListener("change", async () => {
  await attach(at("pictures").files);
  at("pictures").value = "";
});
at("message").addEventListener("paste", (event) => attach(event.clipboardData.files));
at("form").addEventListener("dragover", (event) => event.preventDefault());
at("form").addEventListener("drop", (event) => {
  event.preventDefault();
  attach(event.dataTransfer.files);
});
