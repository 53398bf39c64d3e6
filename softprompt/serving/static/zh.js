"use strict";
// The texts of the page in Chinese, by the English ones, for browsers whose language is Chinese.

const ZH = {
  "Chat": "对话",
  "Choices": "选项",
  "Side by side": "并排比较",
  "New": "新对话",
  "Choices, one per line": "选项，每行一个",
  "Write a message": "输入消息",
  "Message": "消息",
  "Send": "发送",
  "Stop": "停止",
  "Settings": "设置",
  "Temperature": "温度",
  "Tokens at most": "最多词元数",
  "adapter’s": "由适配器定",
  "Send the earlier turns, too": "同时发送之前的对话",
  "Answers from": "回答者",
  "Conversation": "对话内容",
  "API key": "API 密钥",
  "Use this key": "使用此密钥",
  "It is kept until this tab is closed.": "关闭此标签页前，密钥一直有效。",
  "The server does not answer. Is it still running?": "服务器没有响应。它还在运行吗？",
  "The server answered with this status:": "服务器返回的状态码：",
  "This server wants an API key.": "此服务器需要 API 密钥。",
  "The connection broke off.": "连接中断了。",
  "The answer ended too early.": "回答提前结束了。",
  "Stopped.": "已停止。",
  "Cut off: the limit of tokens was reached.": "已截断：达到词元数上限。",
  "The answer is empty.": "回答为空。",
  "Write at least two choices, one per line.": "请至少输入两个选项，每行一个。",
  "Write a message.": "请输入消息。",
};

const chinese = navigator.language.startsWith("zh");

/** Return a text of the page in the language of the browser. */
function t(text) {
  return chinese ? (ZH[text] ?? text) : text;
}

/** Translate the texts of an element or fragment, and what its fields show and read out. */
function translate(root) {
  const texts = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) texts.currentNode.data = texts.currentNode.data.replace(/\S(.*\S)?/, t);
  for (const name of ["placeholder", "aria-label"]) {
    root.querySelectorAll(`[${name}]`).forEach((field) => field.setAttribute(name, t(field.getAttribute(name))));
  }
}

translate(document.body);
translate(document.getElementById("panel").content);
if (chinese) document.documentElement.lang = "zh-CN";
